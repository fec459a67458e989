"""Files changed at random: what they say is read, or one sentence says why not."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import logging

from dlm import lora as lora_lib
from dlm.heads import dflash, eagle_3, files, learn2pd
from dlm.heads.medusa import MedusaHeads
from dlm.heads.published import dflash as published_dflash
from dlm.heads.published import eagle_3 as published_eagle_3
from dlm.hf.files import format_for, format_of, raw_config, read_config
from dlm.hf.generation import read_generation
from dlm.hf.gguf import load_gguf_params, read_gguf_config
from dlm.hf.gguf_file import open_gguf
from dlm.hf.gguf_tokenizer import load_gguf_tokenizer
from dlm.hf.saving import save_hf
from dlm.hf.tokenizer import load_tokenizer
from dlm.hf.weights import load_params
from dlm.lm import LanguageModel
from dlm.lora import Lora
from dlm.params import param_specs
from dlm.tokenizer import byte_tokenizer
from tests.dlm.hf.test_files import LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_0_6B
from tests.lib.checkpoints import random_params
from tests.lib.families import FAMILIES, IDS, SIZES
from tests.lib.gguf_files import TOKENIZER, renamed, write_gguf
from tests.lib.heads import init
from tests.lib.mutations import AT_RANDOM, VALUES, changed, damaged, outcome, to_json, try_all
from tests.lib.paths import GOLDEN

CONFIGS = [
    *(LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_0_6B),
    *(json.loads((GOLDEN / x / "config.json").read_text()) for x in ("llada_small", "dream_small")),
    *(raw_config(cfg, format_for(cfg)) for cfg in FAMILIES.values()),
]
KEYS = sorted({key for raw in CONFIGS for key in raw} | {"rope_parameters", "auto_map"})
ROTARY = [
    *({"rope_type": "yarn"}, {"rope_type": "llama3", "factor": "x"}, {"rope_type": ["a"]}),
    *({"rope_type": "linear", "factor": 0}, {"rope_type": "dynamic", "factor": -1}),
    *({"type": "longrope", "short_factor": [1.0], "long_factor": [0]}, {"type": "su"}),
]


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity(logging.ERROR)
    yield
    logging.set_verbosity(logging.INFO)


@AT_RANDOM
def test_configs(tmp_path, num):
    """Sizes are as given, and what is read is written as what is read again."""
    file = tmp_path / "config.json"

    def test(rng):
        raw = changed(rng, rng.choice(CONFIGS), VALUES + ROTARY, KEYS)
        data = to_json(raw)
        file.write_bytes(damaged(rng, data) if rng.random() < 0.1 else data)
        cfg = outcome(read_config, tmp_path)
        if cfg is None:
            return
        raw = json.loads(file.read_bytes())
        for name, key in format_of(file, raw).fields.items():
            assert raw.get(key) in (None, getattr(cfg, name)), key
        if (written := outcome(lambda: raw_config(cfg, format_for(cfg)))) is not None:
            file.write_bytes(to_json(written))
            assert read_config(tmp_path) == cfg

    try_all(num, test)


GENERATION = {
    "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05,
    "repetition_penalty": 1.05, "eos_token_id": [2, 3], "stop_strings": ["</s>"], "num_beams": 1,
    "max_length": 20, "_from_model_config": True, "suppress_tokens": None,
}  # fmt: skip


@AT_RANDOM
def test_generation_settings(tmp_path, num):
    def test(rng):
        data = to_json(changed(rng, GENERATION))
        data = damaged(rng, data) if rng.random() < 0.1 else data
        (tmp_path / "generation_config.json").write_bytes(data)
        (tmp_path / "config.json").write_bytes(to_json(LLAMA_3_1_8B))
        outcome(read_config, tmp_path)
        found = outcome(read_generation, tmp_path, LLAMA_3_1_8B)
        assert found is None or set(found) <= {*GENERATION, "stop"}

    try_all(num, test)


# ---- Tokenizers -------------------------------------------------------------------------------

TOKENS = [
    *("<|endoftext|>", {"a": "b"}, {"content": 3}, {"content": "x", "lstrip": 1}),
    *({"259": {"content": "x"}}, {"99999999999999": "x"}, "{% if %}", "{{ messages[9].x.y }}"),
    *([{"name": {}, "template": "x"}], [{"name": "default", "template": "{{ messages }}"}]),
]
OF_TOKENS = [
    *("eos_token", "bos_token", "mask_token", "image_token", "additional_special_tokens"),
    *("extra_special_tokens", "added_tokens_decoder", "chat_template", "add_bos_token"),
]


@AT_RANDOM
def test_tokenizer_configs(tmp_path, num):
    byte_tokenizer().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    older = tmp_path / "special_tokens_map.json"
    ends = [None, 2, [3, 9], "x", -1, 10**12, [None], {}]

    def test(rng):
        more = changed(rng, config, VALUES + TOKENS, OF_TOKENS)
        (tmp_path / "tokenizer_config.json").write_bytes(to_json(more))
        (tmp_path / "config.json").write_bytes(to_json({"eos_token_id": rng.choice(ends)}))
        older.write_bytes(to_json(changed(rng, config, VALUES + TOKENS, OF_TOKENS)))
        if rng.random() < 0.5:
            older.unlink()
        _use(outcome(load_tokenizer, tmp_path))

    try_all(num, test)


def _use(tokenizer):
    """A tokenizer that is read can be used."""
    if tokenizer is not None:
        ids = outcome(tokenizer.encode, "Hi 5")
        assert ids is None or isinstance(tokenizer.decode(ids), str)
        outcome(tokenizer.apply_chat_template, [{"role": "user", "content": "Hi"}])


PIECES = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in ((4, "<s>"), (5, "</s>"))
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "ignore_merges": False, "vocab": {"H": 0, "i": 1, "Ġ": 2, "Hi": 3},
              "merges": [["H", "i"]]},
}  # fmt: skip


@AT_RANDOM
def test_tokenizer_files(tmp_path, num):
    (tmp_path / "tokenizer_config.json").write_bytes(to_json({"eos_token": "</s>"}))

    def test(rng):
        data = to_json(changed(rng, PIECES))
        data = damaged(rng, data) if rng.random() < 0.2 else data
        (tmp_path / "tokenizer.json").write_bytes(data)
        _use(outcome(load_tokenizer, tmp_path))

    try_all(num, test)


def test_panics_of_the_library_are_sentences(tmp_path):
    """A post-processor that names a token which it does not give: no `Exception`, in Rust."""
    frame = PIECES["post_processor"] | {"special_tokens": {}}
    (tmp_path / "tokenizer.json").write_bytes(to_json(PIECES | {"post_processor": frame}))
    (tmp_path / "tokenizer_config.json").write_bytes(to_json({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match=r"cannot be encoded \(no entry found for key\)"):
        load_tokenizer(tmp_path)


# ---- Weights ----------------------------------------------------------------------------------

SMALL = dataclasses.replace(
    FAMILIES["MistralForCausalLM"], n_layers=1, sliding_window=None,
    pattern=("dense global rotary",), family=None,
)  # fmt: skip


def header_of(data: bytes):
    """What a safetensors file begins with, and what follows."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(rng, data: bytes) -> bytes:
    """A safetensors file that says something else of its tensors."""
    if rng.random() < 0.4:
        return damaged(rng, data, len(data) - len(header_of(data)[1]) + 8)
    header, rest = header_of(data)
    words = ["F32", "F16", "BF16", "F8_E4M3", "I8", "BOOL", [0, 0], [0, 2**40], [2**63, 1]]
    text = to_json(changed(rng, header, VALUES + words, ["dtype", "shape", "data_offsets"]))
    return len(text).to_bytes(8, "little") + text + rest


@AT_RANDOM
def test_safetensors(tmp_path, num):
    params = random_params(SMALL)
    save_hf(tmp_path / "one", params, SMALL)
    file = tmp_path / "one" / "model.safetensors"
    whole = file.read_bytes()
    specs = jax.tree.map(lambda spec: spec.shape, param_specs(SMALL))

    def test(rng):
        file.write_bytes(with_header(rng, whole))
        loaded = outcome(load_params, file.parent, SMALL)
        if loaded is not None:
            assert jax.tree.map(lambda x: x.shape, loaded) == specs

    try_all(num, test)


@AT_RANDOM
def test_indices_of_several_files(tmp_path, num):
    save_hf(tmp_path / "one", random_params(SMALL), SMALL, shard_bytes=10_000)
    index = tmp_path / "one" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    right = load_params(index.parent, SMALL)
    values = VALUES + ["config.json", "../one/config.json", ".", "model-00001-of-00002.safetensors"]

    def test(rng):
        data = to_json(changed(rng, whole, values))
        index.write_bytes(damaged(rng, data) if rng.random() < 0.2 else data)
        loaded = outcome(load_params, index.parent, SMALL)
        assert loaded is None or all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(right), strict=True)
        )

    try_all(num, test)


@AT_RANDOM
def test_gguf(tmp_path, num):
    llama = dataclasses.replace(SMALL, vocab_size=260)
    save_hf(tmp_path / "one", random_params(llama), llama)
    tensors = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
    metadata = {
        "general.architecture": "qwen2", "qwen2.embedding_length": 32, "qwen2.block_count": 1,
        "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
        "qwen2.feed_forward_length": 48, "qwen2.context_length": 128,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-5, "qwen2.rope.freq_base": 1e4,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    file = tmp_path / "x.gguf"
    write_gguf(file, metadata | TOKENIZER, renamed(tensors, 1))
    whole = file.read_bytes()

    def test(rng):
        file.write_bytes(damaged(rng, whole, rng.choice([40, 800, 9000])))
        opened = outcome(open_gguf, file)
        if opened is None:
            return
        cfg = outcome(read_gguf_config, opened)
        if cfg is not None:
            outcome(load_gguf_params, opened, cfg)
        _use(outcome(load_gguf_tokenizer, opened))

    try_all(num, test)


# ---- Beside a model ---------------------------------------------------------------------------

TARGET = dataclasses.replace(FAMILIES["MistralForCausalLM"], **SIZES, **IDS, n_layers=8)


def test_networks_are_small():
    assert TARGET.d_model == 32


@AT_RANDOM
@pytest.mark.parametrize("kind", ["eagle_3", "dflash"])
def test_published_drafters(tmp_path, num, kind):
    heads, module = {
        "eagle_3": (eagle_3.Eagle3Heads(layers=(2, 4, 6), d_ff=16), published_eagle_3),
        "dflash": (dflash.DFlashHeads(mask_id=5, n_layers=2), published_dflash),
    }[kind]
    module.save(tmp_path, heads.network(TARGET, init(heads, TARGET)))
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    assert module.load(tmp_path, TARGET).cfg.d_model == 32

    def test(rng):
        raw = changed(rng, whole, VALUES + ROTARY, KEYS)
        file.write_bytes(damaged(rng, to_json(raw)) if rng.random() < 0.1 else to_json(raw))
        network = outcome(module.load, tmp_path, TARGET)
        assert network is None or network.cfg.vocab_size == TARGET.vocab_size

    try_all(num, test)


@AT_RANDOM
def test_adapters(tmp_path, num):
    lora = Lora(rank=2, alpha=4.0, targets=("q", "down"))
    lora_lib.save(tmp_path, lora, init(lora, TARGET), TARGET)
    config, tensors = (
        tmp_path / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    said, weights = json.loads(config.read_text()), tensors.read_bytes()

    def test(rng):
        is_said = rng.random() < 0.6
        config.write_bytes(to_json(changed(rng, said) if is_said else said))
        tensors.write_bytes(weights if is_said else with_header(rng, weights))
        found = outcome(lora_lib.load, tmp_path, TARGET)
        assert found is None or found[0].scale == 2 or not is_said or found[0].alpha > 0

    try_all(num, test)


@AT_RANDOM
def test_heads_and_filters(tmp_path, num):
    lm = LanguageModel(random_params(TARGET), TARGET)
    heads = MedusaHeads(num_heads=2)
    files.save(tmp_path, heads, lm, init(heads, TARGET))
    learn2pd.save_filter(tmp_path, learn2pd.init_filter(jax.random.key(0), 4))
    read = {
        "heads": lambda: files.load(tmp_path, MedusaHeads, lm),
        "filter": lambda: learn2pd.load_filter(tmp_path, None),
    }
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def test(rng):
        kind, is_json = rng.choice(["heads", "filter"]), rng.random() < 0.5
        file = tmp_path / f"{kind}.{'json' if is_json else 'safetensors'}"
        data = whole[file]
        said = to_json(changed(rng, json.loads(data))) if is_json else with_header(rng, data)
        file.write_bytes(said)
        outcome(read[kind])
        file.write_bytes(data)

    try_all(num, test)
