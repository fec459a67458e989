"""The 8B recipes: what they say, and a smoke test of LoRA on a tiny model's own answers."""

import dataclasses

import jax
import pytest

import dlm
from configs import llada_8b_dparallel, llada_8b_learn2pd, llada_8b_sft
from dlm.lora import TARGETS, load
from dlm.tokenizer import byte_tokenizer, word_tokenizer
from tests.lib import toys
from tests.lib.models import TOY_CFG
from tests.lib.weights import init_params
from train import loop
from train.collect import trajectories
from train.collect.config import TrajectoryConfig
from train.collect.records import open_records
from train.config import ConfigError, build, from_config_dict


def test_dparallel_needs_a_model_answers_and_a_number_of_steps():
    config = llada_8b_dparallel.get_config()
    for field, value in (
        ("data.task.path", "answers"),
        ("train.init_from", "model"),
        ("train.num_steps", 600),
    ):
        with pytest.raises(ConfigError, match=rf"needs a value for --config\.{field}"):
            from_config_dict(config)
        config.update_from_flattened_dict({field: value})
    settings = from_config_dict(config)
    build(settings.train.objective, "train.objective")
    assert settings.data.batch_size * settings.optim.accumulate == 64
    lora = build(settings.train.trainable, "train.trainable")
    assert lora.scale == 1.0 and lora.targets == TARGETS
    released = llada_8b_dparallel.get_config("released").train.trainable
    assert build(released, "train.trainable").targets == ("q", "k", "v", "up")


def test_sft_is_three_epochs_of_the_published_pairs():
    config = llada_8b_sft.get_config()
    rows = config.data.batch_size * config.optim.accumulate
    assert rows == 256 and config.train.num_steps == 3 * 4_500_000 // rows


@pytest.mark.exhaustive
def test_learn2pd_needs_a_model_and_prompts_and_its_smoke_test_runs(tmp_path):
    config = llada_8b_learn2pd.get_config()
    with pytest.raises(ConfigError, match=r"needs a value for --config\.checkpoint"):
        trajectories.run(config, tmp_path / "rounds")
    assert not llada_8b_learn2pd.get_config("trajectories").oracle
    config = llada_8b_learn2pd.get_config("runlocal")
    tokenizer = byte_tokenizer()
    cfg = dataclasses.replace(
        TOY_CFG, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id,
        max_seq_len=256,
    )  # fmt: skip
    model = dlm.LanguageModel(init_params(jax.random.key(0), cfg), cfg, tokenizer)
    dlm.save(tmp_path / "model", model)
    config.checkpoint, config.num_examples = str(tmp_path / "model"), 16
    trajectories.run(config, tmp_path / "rounds")
    records = open_records(tmp_path / "rounds")
    assert len(records) == 16 and records[0]["rounds"]["confidence"].shape[1] == 8


@pytest.mark.slow
@pytest.mark.exhaustive
def test_dparallel_smoke_test(tmp_path):
    tokenizer = word_tokenizer(toys.Copy().pieces)
    cfg = dataclasses.replace(
        TOY_CFG, n_kv_heads=4, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    params = init_params(jax.random.key(0), cfg)
    dlm.save(tmp_path / "model", dlm.LanguageModel(params, cfg, tokenizer))
    collect = TrajectoryConfig(
        checkpoint=str(tmp_path / "model"), task={"make": "tests.lib.toys:Copy"}, num_examples=80,
        prompt_len=8, gen_len=24, block_len=8, batch_size=40,
    )  # fmt: skip
    trajectories.run(collect, tmp_path / "answers")

    config = llada_8b_dparallel.get_config("runlocal")
    config.train.init_from = str(tmp_path / "model")
    config.data.task.path = str(tmp_path / "answers")
    config.data.task.only_right = False  # an untrained model has no right answers
    result = loop.run(config, tmp_path / "run")
    assert result.step == 20 and dlm.load(result.model_path).cfg == cfg
    lora, delta = load(tmp_path / "run" / "adapter", cfg)
    assert lora.rank == 4 and abs(delta["up"]["up"]).max() > 0
