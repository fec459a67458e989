"""What configs have in common: full sections, made of the documented defaults, and small models.

A config states what differs from `train.config`, whose dataclasses say what each field means. Every
field is there nevertheless, so that `--config.section.field=...` may change it.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from train.config import SECTIONS

EXAMPLE = str(pathlib.Path(__file__).with_name("example.jsonl"))

# One turn, as LLaDA's chat template writes it, over the fields of a record.
LLADA_PROMPT = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)

SMALL_MODEL = {
    "d_model": 96,  # width of the residual stream
    "n_layers": 3,
    "n_heads": 4,  # query heads
    "n_kv_heads": 4,  # key/value heads; as many: plain multi-head attention (LLaDA)
    "head_dim": 24,  # d_model / n_heads, as the published format demands
    "d_ff": 256,  # hidden width of the gated MLP
    "rope_theta": 10_000.0,  # base of the rotary frequencies
    "norm_eps": 1e-5,  # inside RMSNorm (LLaDA)
    "tie_embeddings": True,  # one matrix for input and output
    "dtype": "float32",  # of matrix products; most CPUs are slow at bfloat16
}
TINY_MODEL = {  # of smoke tests
    **{"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "d_ff": 64}
}
MASKED_DIFFUSION = {
    "make": "train.objectives.masked_diffusion:MaskedDiffusion",
    "eps": 1e-3,  # smallest masking probability (LLaDA)
    "stratified": True,  # spread masking levels over the batch (not in LLaDA)
    "weight_power": 1.0,  # the published bound (LLaDA)
    "remat": True,  # recompute activations: less memory to move is faster on CPUs too
}


def training(**sections: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Settings of a run, for `train.loop.run`.

    Args:
      **sections: "model" and, of every section of `train.config.RunConfig`, the fields that have no
        default or another value.
    """
    config = ml_collections.ConfigDict({"model": sections.pop("model")})
    for name, make in SECTIONS.items():
        config[name] = section(make, sections.pop(name, {}))
    if sections:
        raise ValueError(f"there is no section {', '.join(sections)}")
    return config


def section(make: type, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """All fields of a dataclass: `changes`, and the defaults of the others.

    Raises:
      ValueError: `changes` has a field that the dataclass has not, or lacks one without a default.
    """
    values = {}
    for field in dataclasses.fields(make):
        if field.name in changes:
            values[field.name] = changes[field.name]
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        else:
            raise ValueError(f"{make.__name__} needs a value for {field.name}")
    if unknown := sorted(set(changes) - set(values)):
        raise ValueError(f"{make.__name__} has no field {unknown[0]}")
    return ml_collections.ConfigDict(values)


def shrink(config: ml_collections.ConfigDict, batch_size: int, num_eval_batches: int) -> None:
    """Makes a run a smoke test of twenty steps, validated and saved after ten."""
    config.data.batch_size = batch_size
    config.train.update(num_steps=20, eval_every=10, num_eval_batches=num_eval_batches)
    config.checkpoint.every = 10
    config.log.every = 5


def check_argument(arg: str, *known: str) -> None:
    """Raises ValueError if `arg` is not among `known`."""
    if arg not in known:
        *others, last = map(repr, known)
        raise ValueError(f"config argument {arg!r} must be {', '.join(others)} or {last}")
