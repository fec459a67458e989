"""Where things are."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"  # small reference traces and checkpoints
SHARED = ROOT.parent / "shared"  # data sets and further traces, if they lie beside the repository
