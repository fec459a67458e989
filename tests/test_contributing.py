"""CONTRIBUTING.md: its example is run, what it names exists; hooks and workflow run the same."""

import re
import sys
import types

import pytest
import yaml

from decode.diffusion import components
from decode.generate import generate
from dlm.lm import LanguageModel
from tests.lib.paths import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RULE = "decode.diffusion.rules.surest_few"


@pytest.fixture
def example(monkeypatch):
    """The example's tests by name, its rule being in the table for as long as they run."""
    file, line, tests = BLOCKS
    module = types.ModuleType(RULE)
    monkeypatch.setitem(sys.modules, RULE, module)
    exec(file, module.__dict__)
    table: dict = {}
    exec(line, table)
    monkeypatch.setattr(components, "SurestFew", table["SurestFew"], raising=False)
    names: dict = {}
    exec(tests, names)
    return {name: value for name, value in names.items() if name.startswith(("test_", "Surest"))}


def test_worked_example(example, toy_cfg):
    example["test_the_surest_few_above_the_floor"]()
    example["test_positions_that_are_not_eligible_take_no_place"]()
    example["test_a_floor_above_one_is_refused"](toy_cfg)
    assert len(example) == 4  # and the rule


def test_worked_example_decodes(example, toy_cfg, toy_params):
    rule = example["SurestFew"](limit=2, floor=0.0)
    lm = LanguageModel(toy_params, toy_cfg, None)
    answer = generate(lm, [1, 2, 3], rule=rule, gen_len=8, block_len=8)
    assert answer.num_forwards == 4  # two per step


def test_named_files_and_targets_exist():
    rules = "decode/diffusion/rules"
    new = {f"{rules}/surest_few.py", f"tests/{rules}/test_surest_few.py"}
    for path in set(re.findall(r"`([\w/]+(?:/|\.py))`", PAGE)) - new - {"op.py"}:
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`?make ([\w-]+)", PAGE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_hooks_and_workflow_run_the_make_targets():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint", "make test"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [
        "make lint",
        "make docs",
        "make test",
    ]
