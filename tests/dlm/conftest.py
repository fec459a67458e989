"""A published directory, changed as a test wants it."""

import json
import shutil

import pytest
import safetensors.numpy

from tests.lib.paths import GOLDEN


@pytest.fixture
def model(tmp_path):
    """Writes a directory: a golden one with changes to its config.json and its tensors."""

    def write(name="llada_small", drop=(), tensors=None, **changes):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        config = {
            k: v
            for k, v in (json.loads((GOLDEN / name / "config.json").read_text()) | changes).items()
            if k not in drop
        }
        (path / "config.json").write_text(json.dumps(config))
        if tensors is None:
            shutil.copy(GOLDEN / name / "model.safetensors", path)
        else:
            safetensors.numpy.save_file(tensors, path / "model.safetensors")
        return path

    return write
