"""Tables of components, drafters, rules, objectives, configs and families, from docstrings."""

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
from collections.abc import Iterable

import configs
from decode.diffusion.components import COMPONENTS
from decode.diffusion.points import METHODS
from decode.diffusion.public import DECODERS
from decode.search.components import STRATEGIES
from decode.speculative.components import ACCEPTANCE_RULES, DRAFTERS
from dlm.hf import formats
from dlm.hf.format import Format
from scripts.docs_tables.arguments import sections
from train import objectives
from train.objectives import Objective

ROOT = pathlib.Path(__file__).parent.parent.parent


def _sentence(doc: str) -> str:
    return " ".join(doc.split("\n\n")[0].split()).replace("|", "\\|")


def _papers(doc: str) -> dict[str, None]:
    return dict.fromkeys(re.findall(r"arXiv:\s*(\d{4}\.\d{5})", doc))


def _row(kind: type, axis: str = "") -> str:
    """A line: first sentence, arXiv ids of the class or else of its module, fields."""
    doc = inspect.getdoc(kind) or ""
    module = inspect.getdoc(sys.modules[kind.__module__]) or ""
    papers = _papers(doc) or _papers(module)
    knobs = []
    for field in dataclasses.fields(kind):
        is_plain = isinstance(field.default, int | float | str)
        if field.name != "kind":  # which is by what `Part` tells parts apart
            knobs.append(f"{field.name} {field.default!r}" if is_plain else field.name)
    says = (
        f"{_sentence(module)} {_sentence(doc)}" if issubclass(kind, Objective) else _sentence(doc)
    )
    cells = [f"`{kind.__name__}`", says, ", ".join(papers), ", ".join(knobs)]
    return "| " + " | ".join([axis, *cells] if axis else cells) + " |"


def _table(kinds: Iterable[type], what: str) -> str:
    head = [f"| {what} | | arXiv | fields (default) |", "|---|---|---|---|"]
    return "\n".join(head + [_row(kind) for kind in kinds])


def _components() -> str:
    head = ["| axis | component | | arXiv | fields (default) |", "|---|---|---|---|---|"]
    return "\n".join(head + [_row(c, axis) for axis, kinds in COMPONENTS.items() for c in kinds])


def _strategies() -> str:
    head = ["| by name | strategy | | arXiv | fields (default) |", "|---|---|---|---|---|"]
    named = {kind: ", ".join(f"`{name}`" for name in kind.points()) for kind in STRATEGIES}
    return "\n".join(head + [_row(kind, names or "none") for kind, names in named.items()])


def objective_kinds() -> list[type[objectives.Objective]]:
    """Every objective of `train.objectives`."""
    found: list[type] = []
    for info in pkgutil.iter_modules(objectives.__path__):
        module = importlib.import_module(f"{objectives.__name__}.{info.name}")
        own = [k for k in vars(module).values() if inspect.isclass(k)]
        found += [k for k in own if k.__module__ == module.__name__]
    return [k for k in found if issubclass(k, Objective)]


def _configs() -> str:
    lines = ["| config | | arXiv |", "|---|---|---|"]
    for info in pkgutil.iter_modules(configs.__path__):
        module = importlib.import_module(f"{configs.__name__}.{info.name}")
        doc = inspect.getdoc(module) or ""
        if "get_config" in vars(module):
            lines.append(f"| `{info.name}` | {_sentence(doc)} | {', '.join(_papers(doc))} |")
    return "\n".join(lines)


def _counts() -> str:
    """How many of everything there are."""
    components = sum(map(len, COMPONENTS.values()))
    rows = {
        f"diffusion methods by name, in one jitted loop: {components} components on "
        f"{len(COMPONENTS)} axes, to be combined": len(METHODS),
        f"drafters in another, under {len(ACCEPTANCE_RULES)} acceptance rules": len(DRAFTERS),
        "search strategies in a third": len(STRATEGIES),
        "training objectives, in one trainer": len(objective_kinds()),
        "architectures whose published checkpoints are read": len(_forms()),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {n} | {what} |" for what, n in rows.items())])


def _forms() -> list[tuple[Format, str]]:
    """Every architecture that is read, and what its module says."""
    found = []
    for info in pkgutil.iter_modules(formats.__path__):
        module = importlib.import_module(f"{formats.__name__}.{info.name}")
        says = _sentence(inspect.getdoc(module) or "")
        found += [(f, says) for f in vars(module).get("FORMATS", (vars(module).get("FORMAT"),))]
    return found


def _families() -> str:
    lines = ["| architecture | `model_type` | |", "|---|---|---|"]
    lines += [f"| `{f.architecture}` | `{f.model_type}` | {says} |" for f, says in _forms()]
    return "\n".join(lines)


def pages() -> dict[pathlib.Path, str]:
    """Every page with tables, as it should be."""
    rules = _table(ACCEPTANCE_RULES, "rule")
    tables = {
        "README.md": {"counts": _counts()},
        "docs/methods.md": {"components": _components()},
        "docs/speculative.md": {"drafters": _table(DRAFTERS, "drafter"), "acceptance rules": rules},
        "docs/search.md": {"strategies": _strategies()},
        "docs/models.md": {"families": _families()},
        "docs/decoders.md": {"arguments": sections(DECODERS)},
        "docs/training.md": {
            "configs": _configs(),
            "objectives": _table(objective_kinds(), "objective"),
        },
    }
    made = {}
    for page, parts in tables.items():
        text = (ROOT / page).read_text()
        for name, table in parts.items():
            start, end = f"<!-- table: {name} -->", f"<!-- end of table: {name} -->"
            before, rest = text.split(start)
            text = f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"
        made[ROOT / page] = text
    return made
