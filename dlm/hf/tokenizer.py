"""Tokenizers in published files: tokenizer.json and what stands beside it, or Qwen2's two."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from absl import logging
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dlm.json_lines import read_json
from dlm.tokenizer import CLEANS, CLEANS_BPE, EOS, MASK, Tokenizer, cleaning_keys, frame, refusing

# MASK tokens of published models; LLaDA's tokenizer_config.json does not say which one it is.
_MASK_NAMES = (MASK, "<|mask|>", "<MASK>", "|<MASK>|")

# A directory that holds one of these is meant to have a tokenizer.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"),
    *("tekken.json", "spiece.model", "sentencepiece.bpe.model"),
)

# How Qwen2 (and so Dream, which publishes only vocab.json and merges.txt) cuts text before BPE.
_QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds files of a tokenizer, readable by `load_tokenizer` or not."""
    return any((pathlib.Path(directory) / name).is_file() for name in _FILES)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Reads `tokenizer.json`, or `vocab.json` and `merges.txt` of the Qwen2 family.

    As in `transformers`, what `tokenizer_config.json` (or the older `special_tokens_map.json` and
    `added_tokens.json`) declares is a token, also where tokenizer.json does not know it; what is
    put around a text is for tokenizer.json to say, and only without one for `add_bos_token` and
    `add_eos_token`. Where no end of a text is named, it is that of
    the model beside it. Chat templates are those of `chat_template.jinja` and
    `additional_chat_templates`, else of tokenizer_config.json.

    Args:
      directory: holds these files.

    Raises:
      FileNotFoundError: the directory or the files are not there.
      ValueError: a file is broken, or no end-of-text token is known.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a directory; give one that holds tokenizer.json")
    config_file = root / "tokenizer_config.json"
    config = _read_config(root)
    file = root / "tokenizer.json"
    if file.is_file():
        with refusing(f"{file} is not a tokenizer file"):
            backend = tokenizers.Tokenizer.from_file(str(file))
    elif (root / "vocab.json").is_file() and (root / "merges.txt").is_file():
        backend = _read_qwen2(root, config)
    else:
        raise FileNotFoundError(
            f"{root} has neither tokenizer.json nor vocab.json with merges.txt; save one there "
            "(Tokenizer.save, or save_pretrained of a fast tokenizer)"
        )
    _add_declared(backend, config, config_file)
    names = _named(config, config_file)
    ids = {name: backend.token_to_id(token.content) for name, token in names.items()}

    def known(*texts: str) -> int | None:
        return next((i for i in map(backend.token_to_id, texts) if i is not None), None)

    eos = ids.get("eos_token")
    eos = _end_of_model(root, backend) if eos is None else eos
    eos = known(EOS) if eos is None else eos
    if eos is None:
        raise ValueError(
            f"{config_file} must name an eos_token; config.json beside it names none, and there "
            f"is no {EOS} either"
        )
    pad, own = ids.get("pad_token"), ("eos_token", "pad_token", "bos_token", "mask_token")
    tokenizer = Tokenizer(
        backend,
        eos,
        eos if pad is None else pad,
        bos_token_id=ids.get("bos_token"),
        mask_token_id=ids.get("mask_token", known(*_MASK_NAMES)),
        chat_template=_chat_template(root, config),
        other_tokens={name: token.content for name, token in names.items() if name not in own},
        cleans_up=all(bool(config.get(key)) for key in cleaning_keys(backend)),
    )
    if not file.is_file():

        def added(name: str) -> tuple[str, int] | None:
            if not config.get(f"add_{name}") or (i := ids.get(name)) is None:
                return None
            return names[name].content, i

        backend.post_processor = frame(added("bos_token"), added("eos_token"))
    for name in ("bos_token", "eos_token"):
        adds = ids.get(name) in tokenizer.encode("", whole=True)
        if (flag := config.get(f"add_{name}")) is not None and flag != adds:
            logging.warning(
                "%s: add_%s=%s is not what %s, which is right.",
                config_file,
                name,
                flag,
                "tokenizer.json does" if file.is_file() else f"can be done without {name}",
            )
    if file.is_file() and (flag := config.get("add_prefix_space")) is not None:
        first = tokenizer.encode("a")[:1]
        if flag != any((backend.id_to_token(i) or "").startswith(("Ġ", "▁")) for i in first):
            logging.warning(
                "%s: add_prefix_space=%s is not what tokenizer.json does, which is taken.",
                config_file,
                flag,
            )
    return tokenizer


def _read_config(root: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by the files that held a part of it before."""
    file = root / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space", CLEANS, CLEANS_BPE):
        if not isinstance(config.get(key), bool | None):
            raise ValueError(f"{file}: {key}={config[key]!r:.60} must be true or false")
    if config.get("split_special_tokens"):
        raise ValueError(f"{file}: split_special_tokens=True is not supported; only False is")
    if "added_tokens_decoder" not in config:
        if (old := root / "special_tokens_map.json").is_file():
            config |= {key: value for key, value in read_json(old).items() if value is not None}
        if (old := root / "added_tokens.json").is_file():
            ids = read_json(old)
            special = {token.content for token in _special(config, file)}
            config["added_tokens_decoder"] = {
                str(i): {"content": text, "normalized": text not in special}
                | {"special": text in special}
                for text, i in ids.items()
            }
    return config


def _named(config: Mapping[str, Any], file: pathlib.Path) -> dict[str, tokenizers.AddedToken]:
    """{"eos_token": ..., "unk_token": ...}: every key that names a special token."""
    more = config.get("extra_special_tokens")
    said = {**config, **(more if isinstance(more, dict) else {})}
    flags = ("add_bos_token", "add_eos_token")  # not tokens
    return {
        key: _added_token(value, key, file, is_special=True)
        for key, value in said.items()
        if key.endswith("_token") and key not in flags and value is not None
    }


def _special(config: Mapping[str, Any], file: pathlib.Path) -> list[tokenizers.AddedToken]:
    """All tokens that the config names as special."""
    found = list(_named(config, file).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        if not isinstance(tokens, (list, dict)):
            raise ValueError(f"{file}: {key}={tokens!r} must be a list of tokens")
        found += [_added_token(t, key, file) for t in tokens if isinstance(tokens, list)]
    return found


def _added_token(
    value: Any, key: str, file: pathlib.Path, is_special: bool = False
) -> tokenizers.AddedToken:
    """As the file says it; special where it does not say, or if it `is_special` anyway."""
    said = {"content": value} if isinstance(value, str) else value
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    is_token = isinstance(said, dict) and isinstance(text := said.get("content"), str) and text
    if not is_token or not all(isinstance(said.get(flag, False), bool) for flag in flags):
        raise ValueError(f"{file}: {key} has {value!r:.80}, which is not a token")
    given = {flag: said[flag] for flag in flags if flag in said}
    given |= {"special": is_special or given.get("special", True)}
    return tokenizers.AddedToken(said["content"], **{"normalized": False} | given)


def _add_declared(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], file: pathlib.Path
) -> None:
    """Makes tokens of all that the config declares, as special as it says.

    Those with ids must get them; others that are new are put behind the last id.
    """
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(str(i).isdecimal() for i in declared):
        raise ValueError(f"{file}: added_tokens_decoder must map token ids to tokens")
    wanted = {int(i): _added_token(t, f"token {i}", file) for i, t in declared.items()}
    backend.add_tokens([token for _, token in sorted(wanted.items())])
    for i, token in wanted.items():
        if (got := backend.token_to_id(token.content)) != i:
            raise ValueError(
                f"{file}: added token {token.content!r} must have id {i}, but the vocabulary and "
                f"the tokens before it give it {got}"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = {token.content: token for token in _special(config, file) if token.content not in known}
    backend.add_tokens(list(new.values()))


def _end_of_model(root: pathlib.Path, backend: tokenizers.Tokenizer) -> int | None:
    """The first end of a text that a model in the same folder names, if it is a token."""
    for file in (root / "config.json", root / "generation_config.json"):
        ends = read_json(file).get("eos_token_id") if file.is_file() else None
        for end in ends if isinstance(ends, list) else [ends]:
            if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < 2**32:
                continue
            if backend.id_to_token(end) is not None:
                return end
    return None


def _read_qwen2(root: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE from `vocab.json` and `merges.txt`, with the added tokens of the config."""
    name = config.get("tokenizer_class")
    if name not in _QWEN2_CLASSES:
        raise ValueError(
            f"{root}: tokenizer_class={name!r} has no tokenizer.json, and vocab.json with "
            f"merges.txt is only understood for {', '.join(_QWEN2_CLASSES)}"
        )
    with refusing(f"{root}: broken vocab.json or merges.txt"):
        model = models.BPE.from_file(str(root / "vocab.json"), str(root / "merges.txt"))
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated")
    has_prefix = bool(config.get("add_prefix_space"))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend


def _chat_template(root: pathlib.Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name."""
    files = {"default": root / "chat_template.jinja"}
    files |= {file.stem: file for file in (root / "additional_chat_templates").glob("*.jinja")}
    try:
        found = {name: f.read_text(encoding="utf-8") for name, f in files.items() if f.is_file()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{root}: a chat template is not UTF-8 ({error})") from error
    if not found and (said := config.get("chat_template")) is not None:
        named = said if isinstance(said, list) else [{"name": "default", "template": said}]
        for entry in named:
            said = entry if isinstance(entry, dict) else {}
            name, text = said.get("name"), said.get("template")
            if not isinstance(name, str) or not isinstance(text, str):
                raise ValueError(
                    f"{root / 'tokenizer_config.json'}: chat_template must be text, or a list of "
                    '{"name": ..., "template": ...}'
                )
            found[name] = text
    if set(found) == {"default"}:
        return found["default"]
    return found or None
