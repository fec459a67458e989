"""Every main is short, answers `--help`, and is named in the documents by the name it has."""

import ast
import re

from tests.lib.mains import run_main
from tests.lib.paths import ROOT

MAX_LINES = 80


def mains():
    """Modules of `scripts` that are commands, by the name behind `python -m`."""
    found = {}
    for file in sorted((ROOT / "scripts").rglob("*.py")):
        if file.name == "__main__.py" or "\nif __name__ ==" in file.read_text():
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__main__")] = file
    return found


def test_mains_are_short():
    long = {name: n for name, file in mains().items()
            if (n := len(file.read_text().splitlines())) > MAX_LINES}  # fmt: skip
    assert not long


def test_modules_that_are_no_mains_have_no_flags():
    files = set((ROOT / "scripts").rglob("*.py")) - set(mains().values())
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            assert "flags" not in names, f"{file.relative_to(ROOT)} imports flags"


def test_every_main_says_what_it_is_for():
    for name in mains():
        text = run_main(name, "--help", code=1)
        assert f"python -m {name}" in text and "--helpfull" in text, (name, text)


def test_models_that_are_not_there_are_one_sentence(tmp_path):
    nowhere = tmp_path / "nowhere"
    further = {
        "scripts.draft_vocab": [f"--config={ROOT}/configs/smollm2.py:eagle_3"],
        "scripts.hso": [f"{ROOT}/README.md"],
        "scripts.length_search": [f"--head={nowhere}", f"--prompts={nowhere}"],
        "scripts.search_budget": ["--task=countdown"],
        "scripts.search_study": ["--task=countdown"],
        "scripts.rest_datastore": [f"{nowhere}/texts.jsonl"],
        "scripts.token_frequencies": [f"{ROOT}/README.md"],
    }
    asked = set()
    for name, file in mains().items():
        flags = re.findall(r'DEFINE_string\(\s*"(\w+)", (.*)', file.read_text())
        loaded = {flag for flag, _ in flags} & {"checkpoint", "model", "models", "target"}
        if not loaded or name in ("scripts.bench", "scripts.plan.compile_tpu"):  # asked for cases
            continue
        needed = loaded | {flag for flag, rest in flags if "required=True" in rest}
        paths = [f"--{flag}={nowhere}" for flag in sorted(needed)]
        text = run_main(name, *paths, *further.get(name, []), code=1)
        assert str(nowhere) in text.splitlines()[-1], (name, text)
        asked.add(name)
    assert {"scripts.answer", "scripts.draw_search", "scripts.token_frequencies"} <= asked


def test_commands_that_are_named_exist():
    there = {*mains(), "scripts.launch"}
    named = set()
    for pattern in ("*.md", "Makefile", "docs/**/*.md", "*/**/*.py"):
        for file in ROOT.glob(pattern):
            if not {".venv", "build"} & set(file.relative_to(ROOT).parts):
                named |= set(re.findall(r"python -m (scripts[.\w]*\w)", file.read_text()))
    assert named and named <= there
