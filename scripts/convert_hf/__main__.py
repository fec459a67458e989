"""Checks a published checkpoint, and writes it again in another dtype or in files of another size.

    python -m scripts.convert_hf --checkpoint=path/to/LLaDA-8B-Instruct --dry_run
    python -m scripts.convert_hf --checkpoint=path/to/Qwen3-8B --dry_run --mesh=fsdp=4,tensor=2
    python -m scripts.convert_hf --checkpoint=path/to/Qwen3-8B --out=path/to/copy --dtype=bfloat16

`dlm.load` reads published directories as they are, so nothing has to be converted before it is
used: a copy is worth while where float32 files are read again and again, or files are too large.
With `--dry_run` only headers are read. It says what the model is, whether the tensors are all there
and of the right shapes, what would be written, and, with `--mesh`, how much each device would hold.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags, logging

from dlm.hf.files import DTYPES, read_config
from dlm.hf.saving import convert_hf
from scripts.convert_hf.describe import describe, parse_mesh
from train.host import only_flags


def main(argv: list[str]) -> None:
    only_flags(argv)
    logging.set_verbosity(logging.WARNING)
    root, shard_bytes = pathlib.Path(flags.FLAGS.checkpoint), int(flags.FLAGS.shard_gb * 1e9)
    dtype = flags.FLAGS.dtype or None
    if dtype not in (None, *DTYPES.values()):
        sys.exit(f"error: --dtype={dtype!r} must be one of {', '.join(DTYPES.values())}")
    try:
        mesh = parse_mesh(flags.FLAGS.mesh)
        print(describe(root, read_config(root, dtype), shard_bytes, mesh))
        if flags.FLAGS.dry_run:
            return
        if not flags.FLAGS.out:
            raise ValueError("--out='' must name the folder to write, unless --dry_run is given")
        convert_hf(root, flags.FLAGS.out, dtype, shard_bytes)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"\nWritten: {flags.FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A directory in a published format.", required=True)
    flags.DEFINE_string("out", "", "The directory to make.")
    flags.DEFINE_string("dtype", "", "Such as bfloat16; empty: as it is.")
    flags.DEFINE_float("shard_gb", 5.0, "Largest file that holds several tensors, in GB.", 1e-6)
    flags.DEFINE_list("mesh", [], "Such as fsdp=4,tensor=2: what each device would hold.")
    flags.DEFINE_bool("dry_run", False, "Reads headers only, and writes nothing.")
    app.run(main)
