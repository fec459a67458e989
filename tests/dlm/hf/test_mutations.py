"""Files changed at random: a model is read, or one sentence says why not."""

import json
import pathlib
import tempfile

from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.hf.files import read_config
from dlm.tokenizer import byte_tokenizer, load_tokenizer
from tests.dlm.hf.test_files import LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_0_6B
from tests.lib.paths import GOLDEN

CONFIGS = [
    *(LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_0_6B),
    *(json.loads((GOLDEN / x / "config.json").read_text()) for x in ("llada_small", "dream_small")),
]
KEYS = sorted({key for config in CONFIGS for key in config} | {"rope_parameters", "auto_map"})
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 10**12, 0.5, -0.5, 1e300, float("nan"), float("inf")),
    *("", "x", "auto", "silu", [], [1], [None], ["x"], [[1]], {}, {"a": 1}, {"type": 3}),
    *({"rope_type": "yarn"}, {"rope_type": "llama3", "factor": "x"}, {"rope_type": ["a"]}),
    *({"rope_type": "linear", "factor": 0}, {"rope_type": "dynamic", "factor": -1}),
]
TOKENS = [
    *(None, True, 3, "", "x", "é", "<|endoftext|>", [], ["x"], [3], {}, {"a": "b"}, {"5": "x"}),
    *({"content": "x"}, {"content": 3}, {"content": "x", "lstrip": 1}, {"259": {"content": "x"}}),
    *("{{ x }}", "{% if %}", [{"name": {}, "template": "x"}], {"99999999999999": "x"}),
]
OF_TOKENS = [
    *("eos_token", "bos_token", "mask_token", "image_token", "additional_special_tokens"),
    *("extra_special_tokens", "added_tokens_decoder", "chat_template", "add_bos_token"),
]


def changes(keys, values):
    return st.dictionaries(st.sampled_from(keys), st.sampled_from(values), min_size=1, max_size=3)


def outcome(read, *args):
    """What is read, or None after a sentence."""
    try:
        return read(*args)
    except (ValueError, FileNotFoundError) as error:
        assert 10 < len(str(error)) < 900 and "\n\n" not in str(error)
        return None


@settings(max_examples=300, deadline=None)
@given(config=st.sampled_from(CONFIGS), changed=changes(KEYS, VALUES))
def test_configs(config, changed):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config | changed))
        cfg = outcome(read_config, folder)
        assert cfg is None or cfg.n_layers >= 1


@settings(max_examples=200, deadline=None)
@given(
    changed=changes(OF_TOKENS, TOKENS),
    older=st.one_of(st.none(), changes(OF_TOKENS, TOKENS)),
    ends=st.sampled_from([None, 2, [3, 9], "x", -1, 10**12, [None], {}]),
)
def test_tokenizers(changed, older, ends):
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        byte_tokenizer().save(root)
        config = json.loads((root / "tokenizer_config.json").read_text())
        (root / "tokenizer_config.json").write_text(json.dumps(config | changed))
        (root / "config.json").write_text(json.dumps({"eos_token_id": ends}))
        if older is not None:
            (root / "special_tokens_map.json").write_text(json.dumps(older))
        tokenizer = outcome(load_tokenizer, root)
        if tokenizer is not None:
            assert tokenizer.decode(tokenizer.encode("Hi", whole=True)).endswith("Hi")
            outcome(tokenizer.apply_chat_template, [{"role": "user", "content": "Hi"}])
    logging.set_verbosity(logging.INFO)
