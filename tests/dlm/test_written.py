"""Files that cannot be written are named."""

import pathlib

import numpy as np
import pytest

from dlm.written import write_json, write_tensors, write_text

FULL = pathlib.Path("/dev/full")  # a disk without room


def test_a_full_disk_is_told_with_the_file():
    if not FULL.exists():
        pytest.skip("this system has no /dev/full")
    for write in (lambda: write_text(FULL, "x"), lambda: write_json(FULL, {})):
        with pytest.raises(OSError, match=r"^/dev/full cannot be written \(No space left on dev"):
            write()


def test_so_is_what_else_goes_wrong(tmp_path):
    message = r"there/x cannot be written \(.*\): make room there, or mend what is wrong$"
    with pytest.raises(OSError, match=message):
        write_text(tmp_path / "there" / "x", "x")
    with pytest.raises(OSError, match=message):  # whatever the library calls it
        write_tensors(tmp_path / "there" / "x", {"a": np.zeros(3)})


def test_json_keeps_its_characters(tmp_path):
    write_json(tmp_path / "x.json", {"a": "é"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
