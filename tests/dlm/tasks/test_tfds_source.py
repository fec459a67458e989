import pathlib
import pickle
import sys

import numpy as np
import pytest

from dlm.tasks import tfds_source
from dlm.tokenizer import byte_tokenizer
from train.config import ConfigError, DataConfig
from train.data import train_iterator

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


class TinySums(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self):
        features = {"text": tfds.features.Text(), "sum": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"{i} plus één", "sum": i + 1}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A tiny prepared data set, written without TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinySums(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def open_task(data_dir, split="train", prompt="{text} = ", completion="{sum}", **options):
    return tfds_source.TfdsTask(
        "tiny_sums", split, prompt, completion, data_dir=data_dir, **options
    )


def test_examples_are_text(data_dir):
    task = open_task(data_dir)
    assert len(task) == 8
    examples = [task[i] for i in range(8)]
    assert {example.prompt for example in examples} == {f"{i} plus één = " for i in range(8)}
    for example in examples:
        assert int(example.prompt.split()[0]) + 1 == int(example.completion)
        assert example.metadata["operation"] == "tiny_sums"
        assert example.metadata["sum"] == int(example.completion)
        assert task.score(example, f" {example.completion}\n") == {"score": 1.0}
        assert task.score(example, "0") == {"score": 0.0}
    assert "tensorflow" not in sys.modules


def test_random_access(data_dir):
    task = open_task(data_dir, split="train[2:5]")
    assert len(task) == 3
    assert task[np.int64(2)] == task[2] == pickle.loads(pickle.dumps(task))[2]
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"index={index} must be in"):
            task[index]


def test_long_records_are_named_by_the_trainer(data_dir):
    task = open_task(data_dir)
    config = DataConfig(task={}, prompt_len=9, completion_len=4, batch_size=8, num_threads=0)
    message = r"^tiny_sums, split train, record \d: the prompt has 15 tokens, more than data.prompt"
    with pytest.raises(ConfigError, match=message):
        next(train_iterator(task, byte_tokenizer(), config))


def test_own_scorer(data_dir):
    task = open_task(data_dir, scorer=lambda example, text: {"score": float(text == "yes")})
    assert task.score(task[0], "yes") == {"score": 1.0}


def test_errors(data_dir):
    with pytest.raises(
        ValueError, match=r"tiny_sums, split test, record 0: .*'answer'.* sum, text"
    ):
        open_task(data_dir, split="test", completion="{answer}")
    with pytest.raises(ValueError, match=r"split='train\[:0\]' of 'tiny_sums' must have records"):
        open_task(data_dir, split="train[:0]")
    with pytest.raises(ValueError, match="dev"):
        open_task(data_dir, split="dev")
    # A name TFDS has never heard of, and one it knows but that was not prepared.
    for name in ("no_such_set_anywhere", "mnist"):
        with pytest.raises(FileNotFoundError, match=f"name='{name}' must be a data set prepared"):
            tfds_source.TfdsTask(name, "train", "", "", data_dir=data_dir)


def test_missing_package_is_named(monkeypatch, data_dir):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        open_task(data_dir)


def test_decode():
    record = {
        "a": np.array([b"x", "é".encode()], dtype=object),
        "b": {"c": np.float32(0.5), "d": [b"y", np.int64(3)]},
        "e": np.bytes_(b"z"),
        "f": None,
    }
    assert tfds_source.decode(record) == {
        "a": ["x", "é"],
        "b": {"c": 0.5, "d": ["y", 3]},
        "e": "z",
        "f": None,
    }
