"""Packing and buckets: what they give, that nothing is lost, and that they can be resumed."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm import vocab
from dlm.tasks.jsonl import JsonlTask
from dlm.tokenizer import byte_tokenizer, word_tokenizer
from dlm.trainable import Learned
from tests.lib import toys
from tests.lib.paths import SHARED
from tests.lib.tiers import more
from train import data
from train.config import ConfigError, DataConfig
from train.data.rows import bucket_sizes, crop
from train.objectives import Context
from train.objectives.masked_diffusion import MaskedDiffusion

DATA = SHARED / "data"
TOKENIZER = word_tokenizer("abcdef>")  # a = 0, ..., > = 6, EOS = PAD = 7, MASK = 8
EOS = 7

EXAMPLES = DataConfig(task={}, prompt_len=7, completion_len=7, batch_size=4, num_threads=0)
BUCKETS = dataclasses.replace(EXAMPLES, buckets=((5, 5), (3, 3)))  # of 5 and of 9 rows
PACKING = dataclasses.replace(EXAMPLES, prompt_len=0, completion_len=8, packing=True)
APART = dataclasses.replace(PACKING, keep_apart=True)
MODES = {"examples": EXAMPLES, "buckets": BUCKETS, "packing": PACKING, "apart": APART}


def make_iterator(config, task=None, **changes):
    task = task or toys.Lines(has_prompts=not config.packing)
    return data.train_iterator(task, TOKENIZER, dataclasses.replace(config, **changes))


def take(iterator, num):
    return [next(iterator) for _ in range(num)]


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ---- Going on ---------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("num_threads", [3, *more(0, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_a_restored_iterator_gives_the_batches_that_would_have_followed(mode, num_threads):
    """From every batch of two epochs on; states pass through JSON, as they do in a checkpoint."""
    config = MODES[mode]
    iterator = make_iterator(config, num_threads=num_threads, prefetch=2)
    states, batches = [], []
    for _ in range(36):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for start in range(0, 33, 1 if num_threads == 0 else 8):
        # The number of threads may differ, and so may what the iterator has done before.
        fresh = make_iterator(config, num_threads=(num_threads + start) % 3)
        for other in (fresh, iterator):
            other.set_state(json.loads(states[start]))
            assert_equal(take(other, 3), batches[start : start + 3])
        fresh.close()
    iterator.close()


@pytest.mark.parametrize("mode", ["buckets", "packing"])
def test_seeds_differ(mode):
    first, again, other = (take(make_iterator(MODES[mode], seed=s), 3) for s in (0, 0, 1))
    assert_equal(first, again)
    assert any(
        not np.array_equal(a["index"], b["index"]) for a, b in zip(first, other, strict=True)
    )


# ---- Buckets ----------------------------------------------------------------------------------


def test_bucket_sizes_by_hand():
    # 4 * 14 = 56 tokens: 9 rows of 6, 5 of 10.
    sizes = bucket_sizes(((5, 5), (3, 3)), (7, 7), 4, 1)
    assert list(sizes.items()) == [((3, 3), 9), ((5, 5), 5), ((7, 7), 4)]
    assert bucket_sizes(((5, 5), (3, 3)), (7, 7), 4, 2) == {(3, 3): 8, (5, 5): 4, (7, 7): 4}
    assert bucket_sizes((), (7, 7), 4, 4) == {(7, 7): 4}
    assert bucket_sizes(((7, 7),), (7, 7), 4, 4) == {(7, 7): 4}


def test_every_row_is_in_the_smallest_bucket_it_fits_and_filled_up_with_eos():
    task = toys.Lines()
    shapes = collections.Counter()
    for batch in take(make_iterator(BUCKETS, task), 60):
        num_rows, P = batch["prompt"].shape
        G = batch["completion"].shape[1]
        shapes[num_rows, P, G] += 1
        for i, index in enumerate(batch["index"]):
            letters = task[index].completion
            n = len(letters)
            smallest = 3 if n <= 2 else 5 if n <= 4 else 7
            assert P == G == smallest
            ids = TOKENIZER.encode(letters)
            assert batch["prompt"][i].tolist() == [EOS] * (P - n - 1) + ids + [6]
            assert batch["prompt_start"][i] == P - n - 1
            assert batch["completion"][i].tolist() == ids + [EOS] * (G - n)
            assert batch["completion_len"][i] == n + 1
        assert all(x.dtype == np.int32 and len(x) == num_rows for x in batch.values())
    assert shapes.keys() == {(9, 3, 3), (5, 5, 5), (4, 7, 7)}


def test_every_example_once_per_epoch():
    """What has come and what waits is what was read: whole epochs, each example once in each."""
    iterator = make_iterator(BUCKETS)
    seen = []
    for _ in range(60):
        seen += next(iterator)["index"].tolist()
        state = iterator.get_state()
        num_read = state["rows"]["next_index"]
        counts = collections.Counter(seen + state["waiting"])
        epochs = num_read // 64
        assert counts.total() == num_read
        assert {counts[i] for i in range(64)} <= {epochs, epochs + 1}
    assert epochs >= 4


@pytest.mark.exhaustive(every=4)
def test_nothing_is_lost_on_another_mesh():
    """Its batches are smaller, so that more rows wait than one of them has."""
    config = dataclasses.replace(BUCKETS, batch_size=8)
    for num_before in range(1, 20):
        before = data.train_iterator(toys.Lines(), TOKENIZER, config, 1)
        seen = np.concatenate([batch["index"] for batch in take(before, num_before)]).tolist()
        after = data.train_iterator(toys.Lines(), TOKENIZER, config, 8)
        after.set_state(before.get_state())
        for batch in take(after, 9):
            assert len(batch["index"]) in (16, 8)
            seen += batch["index"].tolist()
        state = after.get_state()
        counts = collections.Counter(seen + state["waiting"])
        epochs = state["rows"]["next_index"] // 64
        assert counts.total() == state["rows"]["next_index"]
        assert {counts[i] for i in range(64)} <= {epochs, epochs + 1}


def test_one_bucket_is_the_plain_order():
    """Without smaller buckets, the same examples in the same order as without buckets at all."""
    largest = make_iterator(EXAMPLES, buckets=((7, 7),))
    assert_equal(take(largest, 20), take(make_iterator(EXAMPLES), 20))


def test_cropping_takes_what_lies_along_the_completion_with_it():
    row = data.encode_example(toys.Lines()[0], TOKENIZER, 7, 7)
    n = int(row["completion_len"])
    small = crop({**row, "step_map": np.arange(7)}, 7 - int(row["prompt_start"]), n)
    assert small["prompt_start"] == 0 and small["step_map"].tolist() == list(range(n))
    assert small["completion"].tolist() == row["completion"][:n].tolist()


def test_less_is_padding_with_buckets():
    assert padding(make_iterator(BUCKETS), 60) < 0.6 * padding(make_iterator(EXAMPLES), 60)


def padding(iterator, num_batches):
    """Share of positions before the prompt and behind the completion's EOS."""
    batches = take(iterator, num_batches)
    total = sum(batch["prompt"].size + batch["completion"].size for batch in batches)
    used = sum(
        (batch["prompt"].shape[1] - batch["prompt_start"] + batch["completion_len"]).sum()
        for batch in batches
    )
    return 1 - used / total


def test_buckets_on_real_problems():
    path = DATA / "gsm8k" / "test_dev.jsonl"
    if not path.is_file():
        pytest.skip("shared data is absent")
    task = JsonlTask(path, "{question}\n", "{answer}")
    plain = DataConfig(task={}, prompt_len=1024, completion_len=1280, batch_size=8, num_threads=0)
    buckets = ((192, 192), (256, 384), (384, 512))
    bucketed = dataclasses.replace(plain, buckets=buckets)
    shares = [
        padding(data.train_iterator(task, byte_tokenizer(), config, 8), 60)
        for config in (plain, bucketed)
    ]
    assert shares[0] > 0.7 and shares[1] < 0.45
    numbers = {
        batch["prompt"].shape[1:]: (len(batch["index"]), batch["prompt"].size)
        for batch in take(data.train_iterator(task, byte_tokenizer(), bucketed, 8), 60)
    }
    assert all(num_rows % 8 == 0 for num_rows, _ in numbers.values())


def test_eos_behind_the_end_counts_in_the_loss_of_a_bucket(toy_cfg, toy_params, monkeypatch):
    """Where only EOS costs anything, one nat each, the expected loss is the share of EOS."""
    real = vocab.score
    monkeypatch.setattr(
        vocab,
        "score",
        lambda head, hidden, targets: real(head, hidden, targets).replace(
            log_prob=jnp.where(targets == EOS, -1.0, 0.0)
        ),
    )
    batches = take(make_iterator(BUCKETS), 20)
    for shape in ((9, 3), (5, 5)):
        batch = next(batch for batch in batches if batch["completion"].shape == shape)

        @jax.jit
        @jax.vmap
        def loss(key, batch=batch):
            return MaskedDiffusion(eps=0.1).loss(Learned(toy_params), toy_cfg, batch, Context(key))[
                0
            ]

        losses = np.asarray(loss(jax.random.split(jax.random.key(0), 1024)))
        error = losses.std() / np.sqrt(1024)
        share = (batch["completion"] == EOS).mean()
        assert (batch["completion"] == EOS).sum() > len(batch["index"])  # more than one per row
        assert abs(losses.mean() - share) < 4 * error < 0.1 * share


# ---- Packing ----------------------------------------------------------------------------------


def stream(config, task, num_texts):
    """Texts and their indices in the order of a run without packing."""
    plain = dataclasses.replace(EXAMPLES, completion_len=999, batch_size=1, seed=config.seed)
    iterator = data.train_iterator(task, TOKENIZER, plain)
    index = [int(batch["index"][0]) for batch in take(iterator, num_texts)]
    return index, [TOKENIZER.encode(task[i].completion) + [EOS] for i in index]


def test_no_token_is_lost():
    """Four epochs and more: the rows, put together, are the texts, put together."""
    task = toys.Lines(has_prompts=False)
    batches = take(make_iterator(PACKING, task), 40)
    index, texts = stream(PACKING, task, 4 * 64 + 60)
    rows = np.concatenate([batch["completion"] for batch in batches])
    assert rows.shape == (160, 8) and rows.dtype == np.int32
    expected = np.concatenate(texts)
    assert len(expected) >= rows.size > 4 * 64 * 3
    np.testing.assert_array_equal(rows.ravel(), expected[: rows.size])
    owners = np.repeat(index, [len(text) for text in texts])
    starts = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(starts, owners[: rows.size : 8])
    assert batches[0]["prompt"].shape == (4, 0) and not batches[0]["prompt_start"].any()
    assert (batches[0]["completion_len"] == 8).all()


def test_segments_say_which_text_of_its_row_a_token_is_from():
    """A text that begins where a row does, or goes on in it, is its first one."""
    config = dataclasses.replace(APART, completion_len=12)
    batches = take(make_iterator(config), 20)
    valid = data.valid_batches(toys.Lines(has_prompts=False), TOKENIZER, config, 5)
    for batch in batches + valid:
        ends = np.pad(batch["completion"][:, :-1] == EOS, ((0, 0), (1, 0)))
        np.testing.assert_array_equal(batch["segment"], ends.cumsum(axis=1))
        assert batch["segment"].dtype == np.int32
    assert any((batch["completion"][:-1, -1] == EOS).any() for batch in batches)
    assert "segment" not in next(make_iterator(PACKING))


def test_a_text_after_itself_is_another_one():
    """The last text of an epoch may be the first one of the next."""
    task = toys.Lines(num_examples=1, has_prompts=False)
    batch = next(make_iterator(dataclasses.replace(APART, completion_len=32), task))
    assert batch["segment"].max() > 2


def test_a_text_may_be_longer_than_a_batch():
    class Long(toys.Lines):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return dataclasses.replace(example, completion=example.completion * 40)

    task = Long(num_examples=3, has_prompts=False)
    iterator = make_iterator(PACKING, task)
    states, batches = [], []
    for _ in range(12):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    _, texts = stream(PACKING, task, 30)
    rows = np.concatenate([batch["completion"] for batch in batches]).ravel()
    np.testing.assert_array_equal(rows, np.concatenate(texts)[: rows.size])
    for start in range(11):
        fresh = make_iterator(PACKING, task)
        fresh.set_state(json.loads(states[start]))
        assert_equal(next(fresh), batches[start])


def test_validation_is_packed_in_the_order_of_the_task():
    task = toys.Lines(num_examples=20, has_prompts=False)
    text = np.concatenate([TOKENIZER.encode(task[i].completion) + [EOS] for i in range(20)])
    num_batches = len(text) // 32
    batches = data.valid_batches(task, TOKENIZER, PACKING, num_batches)
    rows = np.concatenate([batch["completion"] for batch in batches]).ravel()
    np.testing.assert_array_equal(rows, text[: num_batches * 32])
    message = f"has 20 examples, enough for {num_batches} whole .*={num_batches + 1} are needed"
    with pytest.raises(ConfigError, match=message):
        data.valid_batches(task, TOKENIZER, PACKING, num_batches + 1)


def test_validation_with_buckets():
    batches = data.valid_batches(toys.Lines(), TOKENIZER, BUCKETS, 8)
    seen = np.concatenate([batch["index"] for batch in batches])
    assert len(set(seen)) == len(seen)
    assert {batch["completion"].shape for batch in batches} <= {(9, 3), (5, 5), (4, 7)}
    with pytest.raises(ConfigError, match=r"has 64 examples, enough for .* whole batches"):
        data.valid_batches(toys.Lines(), TOKENIZER, BUCKETS, 20)


def test_packing_a_real_text(tmp_path):
    source = DATA / "tiny_shakespeare" / "input.txt"
    if not source.is_file():
        pytest.skip("shared data is absent")
    speeches = source.read_text(encoding="utf-8").split("\n\n")
    path = tmp_path / "speeches.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches))
    task = JsonlTask(path, "", "{text}")
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(PACKING, completion_len=256, batch_size=16)
    num_tokens = sum(len(text.encode()) + 1 for text in speeches)
    batches = data.valid_batches(task, tokenizer, config, num_tokens // (16 * 256))
    rows = np.concatenate([batch["completion"] for batch in batches]).ravel()
    text = tokenizer.decode(rows, skip_special_tokens=False)
    assert "\n\n".join(speeches).startswith(text.replace("<|endoftext|>", "\n\n"))
    assert 0 <= num_tokens - rows.size < 16 * 256


# ---- Several processes ------------------------------------------------------------------------


def as_processes(monkeypatch, num, make):
    """What `make()` gives in each of several processes."""
    monkeypatch.setattr(jax, "process_count", lambda: num)
    results = []
    for index in range(num):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        results.append(make())
    monkeypatch.undo()
    return results


def test_processes_share_the_rows_of_the_same_buckets(monkeypatch):
    def shares():
        config = dataclasses.replace(BUCKETS, batch_size=4)
        return take(data.train_iterator(toys.Lines(), TOKENIZER, config, 4), 40)

    def valid():
        return data.valid_batches(toys.Lines(), TOKENIZER, BUCKETS, 5, 4)

    for make in (shares, valid):
        whole = make()
        assert {len(batch["index"]) for batch in whole} == {8, 4}
        both = as_processes(monkeypatch, 2, make)
        for one, zero, first in zip(whole, *both, strict=True):
            for name, x in one.items():
                np.testing.assert_array_equal(np.concatenate([zero[name], first[name]]), x)


def test_processes_share_out_the_texts(monkeypatch):
    task = toys.Lines(has_prompts=False)

    def make():
        return take(data.train_iterator(task, TOKENIZER, PACKING), 12)

    zero, first = as_processes(monkeypatch, 2, make)
    for offset, batches in enumerate((zero, first)):
        assert all(batch["completion"].shape == (2, 8) for batch in batches)
        rows = np.concatenate([batch["completion"] for batch in batches]).ravel()
        ends = np.flatnonzero(rows == EOS)
        texts = [tuple(part[:-1]) for part in np.split(rows, ends + 1)[:-1]]
        own = [tuple(TOKENIZER.encode(task[i].completion)) for i in range(offset, 64, 2)]
        assert collections.Counter(texts[:32]) == collections.Counter(own)  # the first epoch
    whole = data.valid_batches(task, TOKENIZER, PACKING, 4)
    both = as_processes(monkeypatch, 2, lambda: data.valid_batches(task, TOKENIZER, PACKING, 4))
    for one, zero, first in zip(whole, *both, strict=True):
        for name, x in one.items():
            np.testing.assert_array_equal(np.concatenate([zero[name], first[name]]), x)


# ---- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": ((8, 3),)}, r"data\.buckets has \(8, 3\), .* at most data\.prompt_len=7 and"),
        ({"buckets": ((3, 8),)}, "data.completion_len=7"),
        ({"buckets": (3, 3)}, "data.buckets has 3, which must be"),
        ({"buckets": ((3, 0),)}, "data.buckets has"),
        ({"packing": True}, "data.prompt_len=7 must be 0 with data.packing=True"),
        ({"packing": True, "prompt_len": 0, "buckets": ((0, 3),)}, "data.buckets=.* must be"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(EXAMPLES, **changes)


def test_packing_refuses_prompts():
    with pytest.raises(ConfigError, match=r"line .*: data\.packing=True .* a prompt: '[a-f]+>'"):
        next(make_iterator(PACKING, toys.Lines()))


@pytest.mark.parametrize("num_threads", [3, *more(0, 1)])
@pytest.mark.parametrize("mode", ["examples", "buckets"])
def test_a_long_example_is_named_when_its_turn_comes(monkeypatch, mode, num_threads):
    monkeypatch.setattr(toys.Lines, "too_long", 40)
    iterator = make_iterator(MODES[mode], num_threads=num_threads)
    with pytest.raises(
        ConfigError, match=r"^lines\.txt, line 41: the prompt has \d\d tokens, more"
    ):
        take(iterator, 30)
    iterator.close()
