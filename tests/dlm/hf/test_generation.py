"""generation_config.json: what its authors' settings become, what is said, and what comes back."""

import json

import pytest

import dlm
from dlm.hf.generation import read_generation, read_gguf_generation, write_generation
from dlm.hf.saving import save_hf
from tests.lib.checkpoints import TINY, random_params

CASES = {
    "Qwen3": (
        {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
         "pad_token_id": 151643, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
         "transformers_version": "4.51.0"},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ),
    "Qwen2.5": (
        {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8,
         "top_k": 20},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    ),
    "Llama 3.1": (  # 50 is the library's where a file does not say
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
    ),
    "only drawn": ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
    "no top-k": ({"do_sample": True, "top_k": 0, "top_p": 1.0}, {"temperature": 1.0}),
    "not drawn": ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {}),
    "said so": ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2},
                {"repetition_penalty": 1.2}),
    "stops": ({"stop_strings": ["</s>", "User:"]}, {"stop": ("</s>", "User:")}),
    "one stop": ({"stop_strings": "User:"}, {"stop": ("User:",)}),
    "min-p": ({"do_sample": True, "min_p": 0.05, "top_k": None},
              {"temperature": 1.0, "min_p": 0.05}),
    "typical, epsilon, eta": (
        {"do_sample": True, "top_k": 0, "typical_p": 0.2, "epsilon_cutoff": 3e-4,
         "eta_cutoff": 2e-3},
        {"temperature": 1.0, "typical_p": 0.2, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3},
    ),
    "filters that leave all": (
        {"do_sample": True, "top_k": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 1},
        {"temperature": 1.0},
    ),
    "Dream": (
        {"_from_model_config": True, "alg": "origin", "alg_temp": None, "eps": 0.001,
         "mask_token_id": 151666, "max_length": 20, "output_history": False, "steps": 512,
         "temperature": 0.0, "top_k": None, "top_p": None, "num_return_sequences": 1},
        {},
    ),
    "all tokens": ({"do_sample": True, "top_k": -1}, {"temperature": 1.0}),
    "nothing": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("said", "found"), CASES.values(), ids=list(CASES))
def test_settings_are_arguments_of_decoding(tmp_path, caplog, said, found):
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert read_generation(tmp_path, {"temperature": 9.0, "do_sample": True}) == found
    assert not caplog.text
    # ... and come back.
    (tmp_path / "generation_config.json").write_text(json.dumps(write_generation(found)))
    assert read_generation(tmp_path, {}) == found


def test_older_models_have_them_in_their_config(tmp_path):
    raw = {"do_sample": True, "top_k": 5, "hidden_size": 3, "num_beams": 1, "max_length": 20}
    assert read_generation(tmp_path, raw) == {"temperature": 1.0, "top_k": 5}


def test_what_is_not_done_is_said(tmp_path, caplog):
    said = {
        "num_beams": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2], "min_length": 0,
        "typical_p": 1.0, "forced_eos_token_id": None, "max_new_tokens": 5, "new_setting": "x",
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert read_generation(tmp_path, {}) == {}
    assert caplog.messages == [
        f"{tmp_path / 'generation_config.json'}: num_beams=4, no_repeat_ngram_size=3, "
        "suppress_tokens=[1, 2], new_setting='x': not followed here."
    ]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"do_sample": 1}, "do_sample=1 must be true or false"),
        ({"top_k": 2.5}, "top_k=2.5 must be an integer"),
        ({"top_p": True}, "top_p=True must be a number"),
        ({"do_sample": True, "temperature": -1}, r"temperature=-1 must be in \[0, inf\]"),
        ({"do_sample": True, "top_k": -2}, r"top_k=-2 must be in \[-1, "),
        ({"do_sample": True, "top_p": 1.5}, r"top_p=1.5 must be in \[0, 1\]"),
        ({"min_p": 2}, r"min_p=2 must be in \[0, 1\]"),
        ({"typical_p": -0.5}, r"typical_p=-0.5 must be in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be positive"),
        ({"stop_strings": [3]}, r"stop_strings=\[3\] must be a list of texts"),
        ({"stop_strings": [""]}, r"stop_strings=\[''\] must be a list of texts"),
    ],
)
def test_settings_of_another_kind_are_refused(tmp_path, said, message):
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=rf"generation_config.json: {message}"):
        read_generation(tmp_path, {})


def test_a_model_has_them_and_keeps_them(tmp_path):
    """They are no defaults: a call says them."""
    given = {"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.5}
    save_hf(tmp_path / "one", random_params(TINY), TINY, generation=given)
    lm = dlm.load(tmp_path / "one")
    assert lm.generation == given
    dlm.save(tmp_path / "two", lm)
    assert dlm.load(tmp_path / "two").generation == given
    for name in ("one", "two"):
        text = (tmp_path / name / "generation_config.json").read_text()
        assert json.loads(text)["eos_token_id"] == TINY.eos_token_id


def test_of_gguf(tmp_path, caplog):
    said = {"temp": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "mirostat": 2}
    metadata = {f"general.sampling.{key}": value for key, value in said.items()}
    found = read_gguf_generation(tmp_path, metadata | {"general.name": "x"})
    assert found == {"temperature": 0.5, "top_k": 40, "top_p": 0.9}
    assert "general.sampling.mirostat=2: not followed" in caplog.text
    with pytest.raises(ValueError, match=r"general.sampling.temp='x' must be a number"):
        read_gguf_generation(tmp_path, {"general.sampling.temp": "x"})
