"""The README's examples, run."""

import dataclasses
import pathlib
import re

import jax
import pytest

import dlm
from decode.generate import generate
from dlm.params import init_params
from dlm.presets import PRESETS
from dlm.tasks.waiting_line import WaitingLine
from dlm.tokenizer import byte_tokenizer, word_tokenizer
from tests.lib.paths import ROOT

README = (ROOT / "README.md").read_text()
MODEL = "runs/quickstart/train/model"  # where the quickstart leaves it


def block_after(heading: str) -> str:
    """The first Python block below a heading."""
    section = README.split(f"\n## {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> pathlib.Path:
    """An untrained model with the quickstart's vocabulary."""
    tokenizer = word_tokenizer(WaitingLine().pieces)
    cfg = dataclasses.replace(
        PRESETS["tiny"],
        n_kv_heads=4,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = tmp_path_factory.mktemp("readme") / "model"
    dlm.save(path, dlm.LanguageModel(init_params(jax.random.key(0), cfg), cfg, tokenizer))
    return path


def test_notebook_example(model_path, capsys):
    code = block_after("From a notebook")
    assert MODEL in code and len(code.splitlines()) <= 12
    exec(code.replace(MODEL, str(model_path)), {})
    assert capsys.readouterr().out.strip()


def test_draft_and_verify_example(tmp_path, capsys):
    code = block_after("Autoregressive models: draft and verify")
    tokenizer = byte_tokenizer()
    cfg = dataclasses.replace(
        PRESETS["tiny"], vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        shifted_logits=True,
    )  # fmt: skip
    params = init_params(jax.random.key(0), cfg)
    dlm.save(tmp_path / "model", dlm.LanguageModel(params, cfg, tokenizer))
    given = '"path/to/Qwen2.5-7B-Instruct", dtype="bfloat16"'
    assert given in code and "gen_len=256" in code
    code = code.replace(given, repr(str(tmp_path / "model"))).replace("=256", "=24")
    exec(code, {"dlm": dlm})
    assert capsys.readouterr().out.strip()


def test_commit_rule_example(model_path):
    code = block_after("Add a commit rule")
    assert len(code.splitlines()) <= 31
    names: dict = {}
    exec(code, names)
    rule = names["SurestFew"](limit=2, floor=0.0)
    lm = dlm.load(model_path)
    completion = generate(lm, [1, 2, 3], rule=rule, cache="prefix", gen_len=8, block_len=8)
    assert completion.num_forwards >= 4  # at most two per step
    with pytest.raises(ValueError, match="floor=2 must be in"):
        generate(lm, [1, 2, 3], rule=names["SurestFew"](floor=2.0), gen_len=8)


def test_commands_and_files_named_exist():
    for module in re.findall(r"python -m (\w+)(?:\.(\w+))?", README):
        package, name = module
        target = ROOT / package / name
        assert target.with_suffix(".py").is_file() or (target / "__main__.py").is_file(), target
    for config in re.findall(r"--config=(configs/\w+\.py)", README):
        assert (ROOT / config).is_file(), config
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
