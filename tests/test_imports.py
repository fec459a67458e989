"""What a machine without the training libraries can still do, and which way imports point."""

import ast
import subprocess
import sys

from decode.diffusion.components import COMPONENTS
from decode.speculative.components import ACCEPTANCE_RULES, DRAFTERS
from tests.lib.paths import ROOT

TRAINING_ONLY = ("grain", "tensorflow_datasets", "ml_collections", "tensorflow", "torch", "orbax")
LAYERS = {  # package: what it may import of this project, modules and packages
    "kernels_pallas": {"kernels_pallas"},
    "dlm": {"dlm", "kernels_pallas"},
    "decode": {"decode", "dlm", "kernels_pallas"},
    "train": {"train", "decode", "dlm", "kernels_pallas"},
    "configs": {"configs", "train.config", "train.collect.config", "dlm.tasks.presets"},
}


def test_models_and_decoding_need_no_training_libraries():
    code = (
        "import sys\n"
        f"for name in {TRAINING_ONLY}: sys.modules[name] = None\n"
        "import dlm, decode, kernels_pallas\n"
        "import decode.complete, decode.generate, decode.view, dlm.hf.weights\n"
        "import dlm.tasks.waiting_line, dlm.tasks.tfds_source\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_imports_point_one_way():
    packages = {*LAYERS, "scripts"}
    for package, allowed in LAYERS.items():
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for name in names:
                    is_allowed = any(f"{name}.".startswith(f"{known}.") for known in allowed)
                    is_ours = name.split(".")[0] in packages
                    assert is_allowed or not is_ours, f"{file.relative_to(ROOT)} imports {name}"


def test_no_objective_imports_another():
    """What they share is in `train.losses` and `train.reading`."""
    for file in (ROOT / "train" / "objectives").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                is_other = node.module.startswith("train.objectives.")
                assert not is_other, f"{file.relative_to(ROOT)} imports {node.module}"


def test_no_component_names_another():
    """What components of an axis share is in a module that holds none of them.

    A component may be a kind of another; drafters that are made of others name some for examples.
    """
    table = [c for axis in COMPONENTS.values() for c in axis] + [*DRAFTERS, *ACCEPTANCE_RULES]
    homes = {c.__name__: c.__module__ for c in table}
    assert len(homes) == len(table) > 60
    for module in set(homes.values()) - {homes["Hybrid"], homes["DDTree"]}:
        bases = {base.__module__ for c in table if c.__module__ == module for base in c.__mro__}
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        for node in ast.walk(tree):
            names = {node.id} if isinstance(node, ast.Name) else set()
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                is_other = node.module in homes.values() and node.module not in bases
                assert not is_other, f"{module} imports {node.module}"
            for name in names & homes.keys():
                assert homes[name] in bases, f"{module} names {name}"
