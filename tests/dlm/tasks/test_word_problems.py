"""Stories and their solutions: an independent reader solves the story, another checks the sums."""

import re

import pytest

from dlm import tasks
from dlm.tasks.word_problems import WordProblems

MORE, LESS = {"buys", "finds", "gets", "makes"}, {"sells", "loses", "gives", "breaks"}


def solve(story: str) -> int:
    first, *steps, question = story.strip().split("\n")
    name, thing = re.fullmatch(r"(\w+) has \d+ (\w+)\.", first).groups()
    assert question == f"How many {thing}?"
    value = int(first.split()[2])
    for step in steps:
        assert step.split()[0] == name and step.endswith(f" {thing}.")
        verb, numbers = step.split()[1], re.findall(r"\d+", step)
        if verb in MORE | LESS:
            value += int(numbers[0]) * (1 if verb in MORE else -1)
        else:
            value *= {"doubles": 2, "triples": 3}[verb]
        assert 1 <= value <= 99
    return value


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_are_right(split):
    task = WordProblems(split=split)
    kinds = set()
    for i in range(500):
        example = task[i]
        chain, answer = example.completion.split(" #### ")
        assert int(answer) == solve(example.prompt)
        equations = chain.split()
        assert example.metadata["operation"] == f"{len(equations)} steps"
        assert len(equations) == example.prompt.count("\n") - 2
        before = None
        for equation in equations:
            sum_, result = equation.split("=")
            assert eval(sum_) == int(result) and before in (None, re.split(r"[-+*]", sum_)[0])
            before = result
        kinds |= set(chain) & set("+-*")
        assert task.score(example, example.completion) == {"score": 1.0}
    assert kinds == set("+-*")


def test_only_the_final_number_counts():
    task = WordProblems()
    example = tasks.Example("", " 12+9=21 21*2=42 #### 42", {"operation": "2 steps"})
    assert task.score(example, " 12+9=20 #### 42") == {"score": 1.0}
    assert task.score(example, " 12+9=21 21*2=42 #### 41") == {"score": 0.0}
    assert task.score(example, "####") == {"score": 0.0}
