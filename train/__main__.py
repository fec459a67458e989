"""Starts a training run, or goes on with it.

    python -m train --config=configs/mdlm_waiting_line.py --workdir=runs/waiting_line
    python -m train --config=configs/mdlm_waiting_line.py:runlocal --workdir=runs/smoke \\
        --config.optim.learning_rate=1e-3
"""

from __future__ import annotations

import logging as python_logging
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from train import loop
from train.config import ConfigError
from train.host import STOPPED, join_cluster, set_up_process
from train.metrics import NonFiniteError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="A file of configs/, perhaps with an argument after a colon.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same one resumes it.", required=True
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; fields are set by --config.section.field=…")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_ours_or_serious)
    join_cluster()
    set_up_process()
    try:
        result = loop.run(_CONFIG.value, _WORKDIR.value)
    except (ConfigError, NonFiniteError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        logging.error("Interrupted; what was saved before is as it was.")
        sys.exit(130)
    logging.info("Step %d: %s", result.step, result.metrics)
    if result.model_path is None:
        logging.info("Stopped as asked; the same command goes on from here.")
        sys.exit(STOPPED)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; wrong ones end the program with one sentence instead of a stack trace."""
    try:
        rest = flags.FLAGS(list(argv))
        list(_CONFIG.value)  # raises if the file could not be loaded
    except (AttributeError, KeyError) as error:
        text = str(error).strip("'\"").replace("\\n", "\n")  # some are quoted twice
        sys.exit(f"error: the config has no such field: {_last_line(text)}")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {_last_line(str(error))}")
    return rest


def _last_line(text: str) -> str:
    """What a message says in the end; config_flags puts whole stack traces into its messages."""
    return text.strip().splitlines()[-1].strip()


def _is_ours_or_serious(record: python_logging.LogRecord) -> bool:
    """Keeps the many notes of other packages (Orbax above all) out of the log."""
    return record.levelno >= python_logging.WARNING or "/train/" in record.pathname


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse_flags)
