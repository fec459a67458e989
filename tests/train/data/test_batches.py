import dataclasses

import jax
import numpy as np
import pytest
from tokenizers import processors

from dlm.sharding import make_mesh
from dlm.tasks import Encoded, Example
from dlm.tasks.jsonl import JsonlTask
from dlm.tokenizer import Tokenizer, byte_tokenizer, word_tokenizer
from tests.lib import toys
from train import data
from train.config import ConfigError, DataConfig

TOKENIZER = word_tokenizer("abcdef>")  # a = 0, ..., > = 6, EOS = PAD = 7, MASK = 8
CONFIG = DataConfig(task={}, prompt_len=5, completion_len=5, batch_size=4, num_threads=0)


def take(iterator, num):
    return [next(iterator) for _ in range(num)]


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_rows_are_padded_left_and_filled_with_eos_right():
    row = data.encode_example(Example("abc>", "cb", {}), TOKENIZER, 5, 5)
    assert {name: value.dtype for name, value in row.items()} == dict.fromkeys(row, np.int32)
    assert row["prompt"].tolist() == [7, 0, 1, 2, 6] and row["prompt_start"] == 1
    assert row["completion"].tolist() == [2, 1, 7, 7, 7] and row["completion_len"] == 3


def test_edges():
    row = data.encode_example(Example("", "abcd", {}), TOKENIZER, 2, 5)
    assert row["prompt"].tolist() == [7, 7] and row["prompt_start"] == 2
    assert row["completion"].tolist() == [0, 1, 2, 3, 7] and row["completion_len"] == 5
    assert data.encode_example(Example("", "a", {}), TOKENIZER, 0, 2)["prompt"].shape == (0,)


def test_too_long_and_uncovered_texts_say_so():
    with pytest.raises(ConfigError, match=r"prompt has 4 tokens, more than data\.prompt_len=3: 'a"):
        data.encode_example(Example("abc>", "a", {}), TOKENIZER, 3, 5)
    with pytest.raises(ConfigError, match=r"completion has 5 tokens and its end, .*len=5"):
        data.encode_example(Example("a", "abcde", {}), TOKENIZER, 3, 5)
    with pytest.raises(ConfigError, match=r"tokenizer does not fit the task: .*'xyz'"):
        data.encode_example(Example("axyz", "a", {}), TOKENIZER, 8, 5)


def test_what_does_not_fit_is_cut_at_its_far_ends():
    row = data.encode_example(Example("abcdef>", "abcdef", {}), TOKENIZER, 3, 4, cut=True)
    assert row["prompt"].tolist() == [4, 5, 6] and row["prompt_start"] == 0
    assert row["completion"].tolist() == [0, 1, 2, 3] and row["completion_len"] == 4
    full = data.encode_example(Example("", "abcd", {}), TOKENIZER, 0, 4, cut=True)
    assert full["completion"].tolist() == [0, 1, 2, 3] and full["completion_len"] == 4
    short = Example("ab>", "ab", {})
    cut, whole = (data.encode_example(short, TOKENIZER, 3, 4, cut=cut) for cut in (True, False))
    assert_equal(cut, whole)
    trajectory = Encoded(np.arange(5), np.array([3, 1, 2, 7]), np.array([0, 2, 1, 3]))
    row = data.encode_example(trajectory, TOKENIZER, 2, 3, cut=True)
    assert row["prompt"].tolist() == [3, 4] and row["completion"].tolist() == [3, 1, 2]
    assert row["step_map"].tolist() == [0, 2, 1] and row["completion_len"] == 3
    with pytest.raises(ConfigError, match=r"trajectory's prompt has 5 tokens, .*'leave_out' lets"):
        data.encode_example(trajectory, TOKENIZER, 2, 4)


@pytest.mark.parametrize("buckets", [(), ((3, 3),)])
def test_what_does_not_fit_is_left_out(buckets):
    task = toys.Lines()
    config = dataclasses.replace(CONFIG, prompt_len=6, too_long="leave_out", buckets=buckets)
    fits = [i for i in range(64) if len(task[i].completion) <= 4]
    batches = take(data.train_iterator(task, TOKENIZER, config), 60)
    seen = {int(i) for batch in batches for i in batch["index"]}
    assert seen == set(fits) and 20 < len(fits) < 60
    valid = data.valid_batches(task, TOKENIZER, config, 3)
    assert {int(i) for batch in valid for i in batch["index"]} < set(fits)
    if not buckets:
        assert [int(i) for batch in valid for i in batch["index"]] == fits[:12]
        with pytest.raises(ConfigError, match=rf"data\.valid has {len(fits)} examples"):
            data.valid_batches(task, TOKENIZER, config, 16)
    with pytest.raises(ConfigError, match=r"all 64 examples are longer .*'leave_out' leaves none"):
        data.train_iterator(task, TOKENIZER, dataclasses.replace(config, prompt_len=0, buckets=()))


def test_a_begin_token_needs_room_too():
    """Of prompts that are as long as there is room, those stay that bring theirs along."""
    backend = word_tokenizer("abcdef>^").backend  # ^ = 7, EOS = PAD = 8, MASK = 9
    backend.post_processor = processors.TemplateProcessing(
        single=["^", "$A"], special_tokens=[("^", 7)]
    )
    tokenizer = Tokenizer(backend, 8, 8, bos_token_id=7)

    class Prompts(toys.Lines):
        def __getitem__(self, index):
            return Example(("abcd>", "^abc>", "abc>", "abcde>")[index], "a", {})

    config = dataclasses.replace(CONFIG, too_long="leave_out", batch_size=2)
    iterator = data.train_iterator(Prompts(num_examples=4), tokenizer, config)
    rows = {
        int(i): row
        for batch in take(iterator, 6)
        for i, row in zip(batch["index"], batch["prompt"], strict=True)
    }
    assert {i: row.tolist() for i, row in rows.items()} == {
        1: [7, 0, 1, 2, 6],
        2: [7, 0, 1, 2, 6],
    }


@pytest.mark.parametrize(
    "changes", [{}, {"too_long": "cut"}, {"too_long": "leave_out"}, {"packing": True}]
)
def test_the_text_of_a_mask_token_is_no_mask_token(tmp_path, changes):
    """In records it is named before any batch, or text like all special tokens."""
    path = tmp_path / "some.jsonl"
    path.write_text('{"a": "ab"}\n' * 200 + '{"a": "a<|mdm_mask|>"}\n{"a": "<|endoftext|>"}\n')
    config = dataclasses.replace(CONFIG, prompt_len=0, completion_len=99, **changes)
    task, tokenizer = JsonlTask(path, "", "{a}"), byte_tokenizer()
    with pytest.raises(
        ConfigError, match=r"line 201: the text has '<\|mdm_mask\|>' at character 1"
    ):
        data.train_iterator(task, tokenizer, config)
    plain = dataclasses.replace(config, plain=True)
    iterator = data.train_iterator(task, tokenizer, plain)
    texts = "".join(
        map(tokenizer.decode, np.concatenate([next(iterator)["completion"] for _ in range(60)]))
    )
    assert "a<|mdm_mask|>" in texts and "<|endoftext|>" in texts
    row = data.encode_example(task[201], tokenizer, 0, 14, plain=True)
    assert row["completion"].tolist() == [*b"<|endoftext|>", 256] and row["completion_len"] == 14
    row = data.encode_example(task[201], tokenizer, 0, 14)
    assert row["completion"].tolist() == [256] * 14


def test_a_mask_token_in_a_prompt_or_in_validation(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"q": "<|mdm_mask|>", "a": "b"}\n')
    config = dataclasses.replace(CONFIG, prompt_len=20, batch_size=1)
    for call in (data.train_iterator, lambda *args: data.valid_batches(*args, 1)):
        with pytest.raises(ConfigError, match=r"line 1: the text has .*set data\.plain=True"):
            call(JsonlTask(path, "{q}", "{a}"), byte_tokenizer(), config)


def test_all_rows_at_once_but_for_those_that_are_left_out():
    task = toys.Lines()
    config = dataclasses.replace(CONFIG, too_long="leave_out", batch_size=0)
    fits = [i for i in range(64) if len(task[i].completion) <= 4]
    batch = next(data.train_iterator(task, TOKENIZER, config))
    assert batch["index"].tolist() == fits
    assert data.valid_batches(task, TOKENIZER, config, 1)[0]["index"].tolist() == fits
    with pytest.raises(ConfigError, match=rf"data\.train has {len(fits)} rows, all of them in a"):
        data.train_iterator(task, TOKENIZER, config, num_shards=len(fits) - 1)


def test_records_that_cannot_be_encoded_are_named_before_they_are_counted():
    class Odd(toys.Lines):
        def __getitem__(self, index):
            return Example("", "xyz" if index == 50 else "abcdef", {})

    config = dataclasses.replace(CONFIG, too_long="leave_out")
    with pytest.raises(ConfigError, match=r"^lines\.txt, line 51: data\.tokenizer does not fit"):
        data.train_iterator(Odd(), TOKENIZER, config)


def test_packed_texts_with_prompts_come_before_any_batch(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"q": "", "a": "ab"}\n' * 200 + '{"q": "b", "a": "a"}\n')
    config = dataclasses.replace(CONFIG, prompt_len=0, packing=True)
    with pytest.raises(ConfigError, match=r"line 201: data\.packing=True takes whole texts"):
        data.train_iterator(JsonlTask(path, "{q}", "{a}"), TOKENIZER, config)


@pytest.mark.parametrize("single", [["^", "$A"], ["^", "$A", "<|endoftext|>"]])
def test_packed_texts_have_what_the_tokenizer_adds(single):
    """And one end, as a prompt begins when decoding."""
    backend = word_tokenizer("abcdef>^").backend
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("^", 7), ("<|endoftext|>", 8)]
    )
    tokenizer = Tokenizer(backend, 8, 8, bos_token_id=7)
    for text in ("ab", "^ab"):
        assert data.encode_text(Example("", text, {}), tokenizer)["tokens"].tolist() == [7, 0, 1, 8]


def test_errors_reach_the_loop_from_reading_threads():
    config = dataclasses.replace(CONFIG, prompt_len=2, num_threads=1)
    with pytest.raises(ConfigError, match=r"data\.prompt_len=2"):
        next(data.train_iterator(toys.Copy(), TOKENIZER, config))


def test_every_example_once_per_epoch_in_another_order():
    task = toys.Copy(num_examples=16, length=4)
    batches = take(data.train_iterator(task, TOKENIZER, CONFIG), 8)
    rows = np.concatenate([batch["completion"] for batch in batches])
    expected = sorted(
        data.encode_example(task[i], TOKENIZER, 5, 5)["completion"].tolist() for i in range(16)
    )
    assert sorted(rows[:16].tolist()) == sorted(rows[16:].tolist()) == expected
    assert rows[:16].tolist() != rows[16:].tolist()


def test_batches_of_one():
    task = toys.Copy(num_examples=8)
    single = dataclasses.replace(CONFIG, batch_size=1)
    rows = take(data.train_iterator(task, TOKENIZER, single), 8)
    (whole,) = take(
        data.train_iterator(task, TOKENIZER, dataclasses.replace(CONFIG, batch_size=8)), 1
    )
    assert_equal({name: np.concatenate([row[name] for row in rows]) for name in whole}, whole)


def test_seed_and_threads():
    task = toys.Copy()
    first = take(data.train_iterator(task, TOKENIZER, CONFIG), 3)
    threaded = dataclasses.replace(CONFIG, num_threads=2, prefetch=3)
    assert_equal(first, take(data.train_iterator(task, TOKENIZER, threaded), 3))
    other = dataclasses.replace(CONFIG, seed=1)
    assert not np.array_equal(
        first[0]["prompt"], next(data.train_iterator(task, TOKENIZER, other))["prompt"]
    )


def test_iterator_state_can_be_restored():
    task = toys.Copy()
    iterator = data.train_iterator(task, TOKENIZER, dataclasses.replace(CONFIG, num_threads=1))
    take(iterator, 5)
    state = iterator.get_state()
    following = take(iterator, 3)
    fresh = data.train_iterator(task, TOKENIZER, CONFIG)
    fresh.set_state(state)
    assert_equal(take(fresh, 3), following)


@pytest.mark.parametrize("num_threads", [0, 1])
def test_batches_do_not_depend_on_the_number_of_processes(monkeypatch, num_threads):
    """Over several epochs, and from a state that another number of processes saved."""
    task = toys.Copy(num_examples=10, length=4)
    config = dataclasses.replace(CONFIG, num_threads=num_threads)

    def make(state=None):
        iterator = data.train_iterator(task, TOKENIZER, config)
        if state is not None:
            iterator.set_state(state)
        batches = take(iterator, 5), iterator.get_state(), take(iterator, 4)
        return *batches, data.valid_batches(task, TOKENIZER, config, 2)

    first, state, then, valid = make()
    for count in (2, 4):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        made = []
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            made.append((*make(), make(state)[0]))
            assert made[-1][1] == state
        for whole, *parts in (
            (first, *(m[0] for m in made)),
            (then, *(m[2] for m in made)),
            (valid, *(m[3] for m in made)),
            (then, *(m[4][:4] for m in made)),
        ):
            for one, *shares in zip(whole, *parts, strict=True):
                for name, x in one.items():
                    np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), x)
    with pytest.raises(ConfigError, match="batch_size=3 must be a multiple of 4 processes"):
        data.train_iterator(task, TOKENIZER, dataclasses.replace(CONFIG, batch_size=3))


def test_validation_batches():
    batches = data.valid_batches(toys.Copy(), TOKENIZER, CONFIG, 2)
    assert len(batches) == 2 and batches[0]["completion"].shape == (4, 5)
    assert data.valid_batches(None, TOKENIZER, CONFIG, 2) == []
    with pytest.raises(ConfigError, match=r"has 7 examples; .* need 8"):
        data.valid_batches(toys.Copy(num_examples=7), TOKENIZER, CONFIG, 2)


def test_global_batches_are_sharded_by_rows():
    batch = data.valid_batches(toys.Copy(), TOKENIZER, CONFIG, 1)[0]
    placed = data.to_global(batch, make_mesh(data=2, fsdp=2, tensor=2))
    assert_equal(jax.device_get(placed), batch)
    assert placed["prompt"].sharding.shard_shape((4, 5)) == (1, 5)
    assert placed["prompt_start"].sharding.shard_shape((4,)) == (1,)
