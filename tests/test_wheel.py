"""The wheel: it is built without network, holds everything, and works outside the repository."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.lib.paths import ROOT

pytest.importorskip("setuptools", minversion="77", reason="the extra `dev` has a newer setuptools")
PACKAGES = ("configs", "decode", "dlm", "kernels_pallas", "scripts", "train")
USE = """
import importlib.util, pathlib, pkgutil
import configs, decode, dlm, kernels_pallas, scripts, train
from configs import sft_jsonl
from train import loop
from train.config import from_config_dict

here = pathlib.Path(configs.__file__).parent.parent
has_harness = importlib.util.find_spec("lm_eval") is not None
for package in (configs, decode, dlm, kernels_pallas, scripts, train):
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        is_main = info.name.startswith("scripts.") or info.name.endswith("__main__")
        needs_extra = info.name == "decode.evaluation.lm_eval" and not has_harness
        module = None if is_main or needs_extra else importlib.import_module(info.name)
        assert module is None or here in pathlib.Path(module.__file__).parents, module
config = sft_jsonl.get_config("runlocal")
config.train.init_from = "model"
print(*map(len, loop._build_tasks(from_config_dict(config))))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    subprocess.run([*pip, *build, folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    install = ("install", "--no-deps", "--no-index", "--no-compile", "--target")
    subprocess.run([*pip, *install, folder / "site", wheel], check=True)
    return folder / "site"


def python(installed: pathlib.Path, *arguments: str) -> str:
    """What Python prints in a folder that has nothing to do with the repository."""
    env = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=env, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_every_file_of_the_packages_is_in_it(installed):
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (installed / file.relative_to(ROOT)).is_file(), file.relative_to(ROOT)
    assert not (installed / "tests").exists()


@pytest.mark.slow
def test_everything_is_imported_and_data_are_read_outside_of_the_repository(installed):
    assert python(installed, "-c", USE).splitlines()[-1] == "36 36"


@pytest.mark.exhaustive(every=4)
@pytest.mark.slow
@pytest.mark.parametrize("main", ["train", "scripts.ask"])
def test_commands_say_how_they_are_used(installed, main):
    said = python(installed, "-m", main, "--help")
    assert "flags:" in said and str(installed) in said, said
