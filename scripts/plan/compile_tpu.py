"""Compiles kernels, whole decoding loops and training steps for TPUs, on a machine that has none.

    python -m scripts.plan.compile_tpu --target=v5e:2x2
    python -m scripts.plan.compile_tpu --target=v5e:2x4 --recipes=llada_8b_dparallel
    python -m scripts.plan.compile_tpu --target=v5e:2x2 --recipes=llada_8b_learn2pd

libtpu's compiler needs no TPU: `make .venv/libtpu` puts it beside the environment, or install the
version that `pip install 'jax[tpu]'` would take. Every program is compiled for real shapes and one
JSON line is printed for it: seconds to compile, bytes of arguments, temporaries and donated
(aliased) buffers per chip, how many Pallas kernels it calls, the VMEM their tiles take, and
`full_logits`: shapes of any array that spans the vocabulary other than the embedding and the head,
of which there should be none.

`--only=llama3_8b tree,training` takes the kernels whose names contain one of these texts.
`--recipes` compiles the training step of those configs instead, or the decoding loops of those that
collect trajectories, on the mesh they ask for.

Every line says `needed_bytes` of each device (arguments, temporaries, and results that are not
written over arguments), to be compared with `hbm_bytes`; `largest`, the largest arrays that the
program holds or streams; and `loop_flops`, operations as the compiler counts them: the body of a
loop once, kernels not at all.
"""

from __future__ import annotations

import json

from scripts.plan import aot  # isort: skip  (before JAX)

from absl import app, flags

from scripts.plan import programs

_TARGET = flags.DEFINE_string("target", "v5e:2x2", "slice to compile for, e.g. v6e:2x2, v5p:2x2x1")
_LOOPS = flags.DEFINE_list("loops", ["llada_8b", "dream_7b"], "models whose loop is compiled")
_ONLY = flags.DEFINE_list("only", [], "parts of the names of kernels; default: every kernel")
_RECIPES = flags.DEFINE_list(
    "recipes", [], "configs whose training step is compiled instead, e.g. llada_8b_sft"
)


def main(argv: list[str]) -> None:
    del argv
    target = _TARGET.value
    if _ONLY.value and _RECIPES.value:
        raise SystemExit("--only: names kernels, and with --recipes none is compiled; give one")
    try:
        devices = aot.devices_of(target)
        meshes = {name: programs.recipe_mesh(name, devices) for name in _RECIPES.value}
    except ValueError as error:
        raise SystemExit(f"--target: {error}") from error
    if meshes:
        compiled = programs.recipes(target, meshes)
    else:
        compiled = programs.programs(devices, _ONLY.value, _LOOPS.value)
    try:
        for program in compiled:
            print(json.dumps({"target": target, **program}), flush=True)
    except ValueError as error:
        raise SystemExit(f"--only: {error}") from error


if __name__ == "__main__":
    app.run(main)
