"""SCAN: navigation commands to action sequences, generated from the published grammar.

Reference: Lake and Baroni, "Generalization without Systematicity: On the Compositional Skills of
Sequence-to-Sequence Recurrent Networks", arXiv:1711.00350, Fig. 6 (grammar) and Fig. 7 (meaning).
The grammar makes 20,910 commands, each with one action sequence of 1 to 48 actions.
"""

import dataclasses
import functools

from dlm import tasks
from dlm.tasks import splits

_ACTIONS = {"walk": "I_WALK", "look": "I_LOOK", "run": "I_RUN", "jump": "I_JUMP"}
_TURNS = {"left": "I_TURN_LEFT", "right": "I_TURN_RIGHT"}
_REPEATS = {"twice": 2, "thrice": 3}
_WORDS = (*_ACTIONS, "turn", *_TURNS, "opposite", "around", *_REPEATS, "and", "after")

# The longest action sequence in the training part of the length split.
MAX_TRAIN_ACTIONS = 22

Pair = tuple[str, tuple[str, ...]]  # command, actions


def _phrases() -> list[Pair]:
    """The grammar's V: one action and perhaps a direction; 34 pairs."""
    pairs: list[Pair] = [(verb, (action,)) for verb, action in _ACTIONS.items()]
    for verb in (*_ACTIONS, "turn"):
        action = (_ACTIONS[verb],) if verb in _ACTIONS else ()
        for direction, turn in _TURNS.items():
            pairs.append((f"{verb} {direction}", (turn, *action)))
            pairs.append((f"{verb} opposite {direction}", (turn, turn, *action)))
            pairs.append((f"{verb} around {direction}", (turn, *action) * 4))
    return pairs


def _sentences() -> list[Pair]:
    """The grammar's S: a phrase, once, twice or thrice; 102 pairs."""
    pairs = _phrases()
    for repeat, times in _REPEATS.items():
        pairs += [(f"{command} {repeat}", actions * times) for command, actions in _phrases()]
    return pairs


@functools.cache
def all_pairs() -> tuple[Pair, ...]:
    """All 20,910 (command, actions) pairs of the grammar's C, each command once."""
    sentences = _sentences()
    pairs = list(sentences)
    for first, first_actions in sentences:
        for second, second_actions in sentences:
            pairs.append((f"{first} and {second}", first_actions + second_actions))
            pairs.append((f"{first} after {second}", second_actions + first_actions))
    return tuple(pairs)


@functools.cache
def _select(split: str, partition: str) -> tuple[Pair, ...]:
    if partition == "simple":
        return tuple(pair for pair in all_pairs() if splits.split_of(pair[0]) == split)
    is_train = split == "train"
    return tuple(pair for pair in all_pairs() if (len(pair[1]) <= MAX_TRAIN_ACTIONS) == is_train)


@dataclasses.dataclass(frozen=True)
class Scan(tasks.Task):
    """All commands of one SCAN split, in the order of the grammar.

    Example:
        >>> task = Scan(split="train", partition="length")
        >>> len(task), task[4].prompt, task[4].completion
        (16990, 'IN: walk left OUT:', ' I_TURN_LEFT I_WALK')

    Attributes:
        split: "train" or "test".
        partition: "simple" puts each command into train (80 %) or test (20 %) by its hash;
            "length" trains on up to 22 actions (16,990) and tests on 24 to 48 (3,920).
    """

    split: str = "train"
    partition: str = "simple"

    def __post_init__(self) -> None:
        splits.check_split(self.split)
        if self.partition not in ("simple", "length"):
            raise ValueError(f"partition={self.partition!r} must be 'simple' or 'length'")

    def __len__(self) -> int:
        return len(_select(self.split, self.partition))

    def __getitem__(self, index: int) -> tasks.Example:
        command, actions = _select(self.split, self.partition)[splits.check_index(index, len(self))]
        conjunction = next((word for word in command.split() if word in ("and", "after")), "single")
        return tasks.Example(
            prompt=f"IN: {command} OUT:",
            completion="".join(f" {action}" for action in actions),
            metadata={"operation": conjunction, "num_actions": len(actions)},
        )

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 for the exact action sequence, white space aside."""
        return tasks.exact_match(example, completion)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The markers, every command word and every action, each with its leading space."""
        words = (*_WORDS, *_ACTIONS.values(), *_TURNS.values())
        return ("IN:", " OUT:", *(f" {word}" for word in words))
