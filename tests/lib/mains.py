"""Commands run inside the test process: starting Python and JAX anew takes longer than most."""

import contextlib
import io
import runpy
import sys
from collections.abc import Iterable

from absl import app, flags

app.define_help_flags()
ABSL = {
    flag.name
    for module, defined in flags.FLAGS.flags_by_module_dict().items()
    if module.startswith("absl")
    for flag in defined
}


def forget(names: Iterable[str]) -> None:
    """Takes flags back."""
    for name in list(names):
        delattr(flags.FLAGS, name)


def run_main(name: str, *arguments: str, code: int = 0) -> str:
    """What `python -m name arguments` prints, its flags forgotten afterwards.

    Args:
      name: of the module.
      arguments: flags and others.
      code: with which it must end.
    """
    argv, said, ended = sys.argv, io.StringIO(), None
    others = {flag: flags.FLAGS[flag] for flag in flags.FLAGS if flag not in ABSL}
    forget(others)  # what another main defined, which some test has imported
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        ended = end.code
    finally:
        sys.argv = argv
        # Grain reads its own flags, and defines them once.
        of_grain = {flag: flags.FLAGS[flag] for flag in flags.FLAGS if flag.startswith("grain_")}
        forget(set(flags.FLAGS) - ABSL)
        for flag, was in {**of_grain, **others}.items():
            flags.FLAGS[flag] = was
        flags.FLAGS.unparse_flags()
    if isinstance(ended, str):  # a message, as the interpreter would show it
        said.write(ended)
        ended = 1
    assert (ended or 0) == code, said.getvalue()
    return said.getvalue()
