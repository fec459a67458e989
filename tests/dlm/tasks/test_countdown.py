import pytest

from dlm.tasks import countdown
from tests.lib.paths import SHARED

DATA = SHARED / "data" / "countdown"


@pytest.mark.parametrize(
    ("numbers", "target", "text", "is_right"),
    [
        ([15, 44, 79], 50, "44-15=29,79-29=50", True),
        ([15, 44, 79], 50, " 44 - 15 = 29,\n79-29=50\n", True),
        ([15, 44, 79], 50, "79+15=94,94-44=50", True),  # another way
        ([15, 44, 79], 50, "44-15=28,79-28=51", False),  # wrong arithmetic
        ([15, 44, 79], 50, "44-15=29,79-29=51", False),
        ([15, 44, 79], 50, "15-44=29,79-29=50", False),  # wrong sign
        ([15, 44, 79], 50, "25+25=50", False),  # numbers out of nowhere
        ([15, 44, 79], 50, "44-15=29", False),  # not the target
        ([15, 44, 79], 50, "44-15=29,79-29=50,50+0=50", False),
        ([10, 5, 7], 15, "10+5=15", False),  # 7 is left
        ([10, 10, 5], 25, "10+10=20,20+5=25", True),  # 10 is given twice
        ([10, 5, 5], 25, "10+10=20,20+5=25", False),  # 10 is given once
        ([7, 2, 1], 3, "7/2=3,3*1=3", False),  # a remainder
        ([8, 2, 1], 4, "8/2=4,4*1=4", True),
        ([5, 5, 9], 9, "5-5=0,9+0=9", True),
        ([5, 5, 9], 0, "5-5=0,9/0=0", False),
        ([5, 5, 9], 0, "5-5=0,0/9=0", True),
        ([3, 8], -5, "3-8=-5", False),
        ([3, 8], 11, "3+8=11,", False),
        ([3, 8], 11, "11", False),
        ([3, 8], 11, "", False),
        ([3, 8], 11, "3+8=11=11", False),
        ([3, 8], 11, "3+8=" + "9" * 5000, False),
    ],
)
def test_is_solution(numbers, target, text, is_right):
    assert countdown.is_solution(numbers, target, text) == is_right


@pytest.mark.parametrize(
    ("text", "is_whole", "share"),
    [
        ("", False, 1.0),
        ("44-15", False, 1.0),  # no comma yet
        ("44-15=29,", False, 1.0),
        ("44-15=28,", False, 0.0),
        ("44-15=29,79-28=51,", False, 0.5),
        ("44-15=28,79-44=35,", False, 0.0),
        ("44-15=29,79-29=50", True, 1.0),
        ("44-15=29,79+29=108", True, 2 / 3),  # not the target
        ("44-15=29", True, 0.5),
        ("44-44=0", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_progress_is_the_share_of_what_is_right(text, is_whole, share):
    assert countdown.progress("15,44,79,50\n", text, is_whole) == share
    assert countdown.progress("15,44,79\n", text, is_whole, target=50) == share


@pytest.mark.parametrize("num_numbers", [2, 3, 4, 5, 6])
def test_generated_puzzles(num_numbers):
    task = countdown.Countdown(num_numbers=num_numbers, min_target=20, max_target=60)
    symbols = set()
    for index in range(50):
        example = task[index]
        *numbers, target = map(int, example.prompt.split(","))
        assert len(numbers) == num_numbers and all(1 <= n <= 99 for n in numbers)
        assert 20 <= target <= 60
        equations = example.completion.split(",")
        assert len(equations) == num_numbers - 1
        assert all(int(equation.split("=")[1]) > 0 for equation in equations)
        assert countdown.is_solution(numbers, target, example.completion)
        symbols |= set(example.completion) & set("+-*/")
    assert symbols >= set("+-")
    if num_numbers > 2:
        assert symbols == set("+-*/")


def test_impossible_fields_stop_with_one_sentence(monkeypatch):
    monkeypatch.setattr(countdown.splits, "MAX_DRAWS", 50)
    task = countdown.Countdown(num_numbers=2, max_number=10, min_target=97, max_target=98)
    with pytest.raises(ValueError, match="no train puzzle in 50 draws"):
        task[0]


@pytest.mark.parametrize("num_numbers", [3, 4, 5])
def test_published_files(num_numbers):
    file = DATA / f"cd{num_numbers}_dev.jsonl"
    if not file.is_file():
        pytest.skip("shared data is absent")
    task = countdown.load_countdown(file)
    assert len(task) == 500
    for index in range(500):
        example = task[index]
        assert task.score(example, example.completion) == {"score": 1.0}
        first, _, rest = example.completion.partition(",")
        assert task.score(example, rest) == task.score(example, first) == {"score": 0.0}
