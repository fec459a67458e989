"""Pages of the documentation: all are in the navigation, links lead somewhere, examples run."""

import ast
import dataclasses
import re
import sys
import types

import pytest
import yaml

import dlm
from decode.complete import complete
from dlm.tokenizer import byte_tokenizer
from tests.lib.paths import ROOT
from tests.lib.tiers import more
from tests.lib.untrained import tiny

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
TRAINED = "train"  # a page whose examples load what its commands train


def text_of(page) -> str:
    """With what it takes from other files by `--8<-- "FILE:NAME"`."""

    def taken(match):
        whole = text_of(ROOT / match[1])
        if match[2]:
            whole = re.search(rf"\[start:{match[2]}\] -->\n(.*?)<!-- --8<-- \[end", whole, re.S)[1]
        return whole

    return re.sub(r'^--8<-- "(.*?)(?::(\w+))?"$', taken, page.read_text(), flags=re.M)


def blocks(page) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.S | re.M)


# ---- Pages and links ---------------------------------------------------------------------------


def navigation(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry)
            for page in navigation(part)]  # fmt: skip


def test_every_page_is_in_the_navigation_once():
    listed = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def anchors(page) -> set[str]:
    """Of headings, as sites and hubs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings}
    return {re.sub(r"[- ]+", "-", slug).strip("-") for slug in slugs}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_what_commands_name_exists():
    for page in PAGES:
        text = text_of(page)
        for module in re.findall(r"python -m ((?:train|scripts|tests)[.\w]*)", text):
            file = ROOT / module.replace(".", "/")
            assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module
        for config in re.findall(r"--config=(configs/\w+\.py)", text):
            assert (ROOT / config).is_file(), f"{page.name}: {config}"
        for target in re.findall(r"^make ([\w-]+)", text, re.M):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


# ---- Examples ----------------------------------------------------------------------------------


def test_what_examples_import_is_there():
    for page in PAGES:
        if page.stem.lower() == "contributing":  # its example is run as the files that it shows
            continue
        for node in ast.walk(ast.parse("\n".join(blocks(page)))):
            if isinstance(node, ast.ImportFrom):
                exec(ast.unparse(node), {})


def test_the_first_example_is_short():
    first, *others = blocks(ROOT / "README.md")
    assert len(first.splitlines()) <= 12 and not others


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A tiny model of bytes, which decodes either way."""
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)
    path = tmp_path_factory.mktemp("docs") / "model"
    dlm.save(path, tiny(tokenizer, 2048))
    return path


RUN = {page.stem: page for page in (ROOT / "README.md", *(DOCS / "howto").glob("*.md"))
       if blocks(page) and page.stem != TRAINED}  # fmt: skip


@pytest.fixture
def run(model_path, tmp_path, monkeypatch):
    """Runs a page's examples in order, in one module, with a small model and short texts."""
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # where dataclasses look names up
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('"one"\n{"prompt": "two", "gen_len": 4}\n')

    def run(name):
        for code in blocks(RUN[name]):
            code = code.replace('"path/to/copy"', '"copy"').replace('"bfloat16"', '"float32"')
            code = re.sub(r'"(path/to/[\w.-]+|smollm2|runs/[\w/]+)"', repr(str(model_path)), code)
            exec(re.sub(r"gen_len=\d+", "gen_len=8", code), module.__dict__)
        return module

    return run


@pytest.mark.parametrize("name", ["README", *more(*sorted({*RUN} - {"README", "extend"}))])
def test_examples_run(name, run, capsys):
    """By default the first one only: what the others call has tests of its own."""
    run(name)
    assert capsys.readouterr().out.strip()


@pytest.mark.exhaustive(every=4)
def test_the_drafter_of_the_page_drafts_and_changes_no_text(run):
    page = run("extend")
    plain = complete(page.lm, "one two three four", gen_len=8)
    drafted = [
        complete(page.lm, "one two three four", drafter=page.Echo(period=period), gen_len=8)
        for period in (1, 2, 3, 4, 5)
    ]
    assert {tuple(answer.tokens) for answer in drafted} == {tuple(plain.tokens)}
    assert min(answer.num_forwards for answer in drafted) < plain.num_forwards
