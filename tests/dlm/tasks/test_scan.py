import pytest

from dlm.tasks import scan
from tests.lib.paths import SHARED

DATA = SHARED / "data" / "scan"


def actions_of(command: str) -> str:
    return " ".join(dict(scan.all_pairs())[command])


def test_counts():
    pairs = scan.all_pairs()
    assert len(pairs) == len(dict(pairs)) == 20_910
    assert len(scan.Scan("train", "length")) == 16_990
    assert len(scan.Scan("test", "length")) == 3_920
    simple_train, simple_test = len(scan.Scan("train")), len(scan.Scan("test"))
    assert simple_train + simple_test == 20_910
    assert abs(simple_test / 20_910 - 0.2) < 0.01
    assert max(len(actions) for _, actions in pairs) == 48


@pytest.mark.parametrize(
    ("command", "actions"),
    [
        ("jump", "I_JUMP"),
        ("turn left", "I_TURN_LEFT"),
        ("run right", "I_TURN_RIGHT I_RUN"),
        ("turn opposite left", "I_TURN_LEFT I_TURN_LEFT"),
        ("look opposite right twice", "I_TURN_RIGHT I_TURN_RIGHT I_LOOK " * 2),
        ("walk around left", "I_TURN_LEFT I_WALK " * 4),
        ("turn around right", "I_TURN_RIGHT " * 4),
        ("jump twice and walk", "I_JUMP I_JUMP I_WALK"),
        ("jump after walk thrice", "I_WALK I_WALK I_WALK I_JUMP"),
    ],
)
def test_meaning(command, actions):
    assert actions_of(command) == actions.strip()


def test_equals_the_published_pairs():
    if not DATA.is_dir():
        pytest.skip("shared data is absent")
    for split, name in (("train", "tasks_train_length.txt"), ("test", "tasks_test_length.txt")):
        lines = (DATA / name).read_text().splitlines()
        published = sorted(tuple(line.removeprefix("IN: ").split(" OUT: ")) for line in lines)
        task = scan.Scan(split, "length")
        ours = sorted(
            (example.prompt[len("IN: ") : -len(" OUT:")], example.completion.strip())
            for example in map(task.__getitem__, range(len(task)))
        )
        assert ours == published


def test_score():
    task = scan.Scan("train", "length")
    example = next(e for e in map(task.__getitem__, range(len(task))) if "jump left" in e.prompt)
    assert example.completion == " I_TURN_LEFT I_JUMP"
    assert task.score(example, "I_TURN_LEFT  I_JUMP\n") == {"score": 1.0}
    for wrong in ("I_JUMP I_TURN_LEFT", "I_TURN_LEFT", "I_TURN_LEFT I_JUMP I_JUMP", "", "I_JUMP"):
        assert task.score(example, wrong) == {"score": 0.0}


def test_operation_is_the_conjunction():
    task = scan.Scan()
    for index in range(0, len(task), 97):
        example = task[index]
        words = example.prompt.split()
        expected = "and" if "and" in words else "after" if "after" in words else "single"
        assert example.metadata["operation"] == expected
        assert example.metadata["num_actions"] == len(example.completion.split())
