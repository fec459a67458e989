"""Commands run inside the test process: starting Python and JAX anew takes longer than most."""

import contextlib
import io
import runpy
import sys

from absl import app, flags

app.define_help_flags()


def run_main(name: str, *arguments: str, code: int = 0) -> str:
    """What `python -m name arguments` prints, its flags forgotten afterwards.

    Args:
      name: of the module.
      arguments: flags and others.
      code: with which it must end.
    """
    known, argv, said, ended = set(flags.FLAGS), sys.argv, io.StringIO(), None
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        ended = end.code
    finally:
        sys.argv = argv
        for flag in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
    if isinstance(ended, str):  # a message, as the interpreter would show it
        said.write(ended)
        ended = 1
    assert (ended or 0) == code, said.getvalue()
    return said.getvalue()
