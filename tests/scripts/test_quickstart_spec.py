"""The page of `scripts.quickstart_spec` combines the seeds that lie beside it."""

import dataclasses
import json

from scripts.quickstart_spec.measure import Measurement
from scripts.quickstart_spec.page import kind, write_page

PLAIN = Measurement("none", 1, True, 1.0, [1.0], 8.0, 0.0, 10.0, 1.0, 1.0)
TREE = Measurement("Medusa, tree", 3, True, 2.0, [0.5, 0.25, 0.25], 4.0, 0.0, 20.0, 0.5, 1.0, 2.0)


def rows(*found):
    return [dataclasses.asdict(m) for m in found]


def test_a_page_of_two_seeds_of_which_one_has_fewer_drafters(tmp_path):
    other = dataclasses.replace(TREE, acceptance_length=3.0, accepted=[0.0, 0.5, 0.5], speedup=4.0)
    about = {"num_prompts": 2, "batch": 1, "gen_len": 8, "dtype": "float32", "device": "cpu"}
    one, two = rows(PLAIN, TREE), rows(other)
    seeds = {seed: {"about": about, "rows": found} for seed, found in (("0", one), ("1", two))}
    (tmp_path / "drafters_scan.json").write_text(json.dumps(seeds))
    write_page(tmp_path)
    page = (tmp_path / "drafters.md").read_text()
    assert "speed-up" not in page  # they are a machine's, not a method's
    assert "## scan" in page and "2 seeds" in page and "![" in page and "| 2.50 ± " in page
    assert (tmp_path / "drafters_scan.png").read_bytes().startswith(b"\x89PNG")


def test_drafters_by_what_is_trained_for_them():
    assert kind("suffix decoding") == kind("none") == "nothing"
    assert kind("draft model, tree") == "a smaller model"
    assert kind("Hydra++, tree") == "a head of the target"
