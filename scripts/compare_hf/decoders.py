"""One prompt decoded by each method of each library."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from tqdm import tqdm

import dlm
from decode.evaluation.run import Programs, timed
from decode.evaluation.tables import markdown
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod

NUM_DRAFTS = {"draft model": 4, "prompt lookup": 8}
MAX_NGRAM = 3  # of prompt lookup
Decoder = Callable[[list[int]], tuple[list[int], int, float]]  # tokens, forwards, seconds


@dataclasses.dataclass
class Tally:
    """One method of one library, over all prompts.

    Attributes:
      texts: what it wrote.
      forwards: of the target.
      seconds: per prompt.
    """

    texts: list[list[int]] = dataclasses.field(default_factory=list)
    forwards: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return 1 / float(
            np.median([s / len(t) for s, t in zip(self.seconds, self.texts, strict=True)])
        )


def ours(folder: pathlib.Path, gen_len: int, prompt_len: int) -> Iterator[tuple[str, Decoder]]:
    """Decoders of this library, by method."""
    lm, draft = (dlm.load(folder / name / "model") for name in ("target", "draft"))
    drafters: dict[str, Drafter] = {
        "none": NoDraft(),
        "draft model": DraftModel(draft.params, draft.cfg, num_drafts=NUM_DRAFTS["draft model"]),
        "prompt lookup": PromptLookup(NUM_DRAFTS["prompt lookup"], MAX_NGRAM),
    }

    def decoder(drafter: Drafter) -> Decoder:
        programs: Programs = {}

        def run(prompt: list[int]) -> tuple[list[int], int, float]:
            done = timed(
                lm, SpeculativeMethod(drafter), [prompt], gen_len=gen_len, prompt_len=prompt_len,
                programs=programs,
            )  # fmt: skip
            (found,) = done.completions
            return found.canvas.tolist(), found.num_forwards, done.prepare_s + done.seconds

        return run

    for name, drafter in drafters.items():
        yield name, decoder(drafter)


def theirs(
    target: pathlib.Path, draft: pathlib.Path | None, gen_len: int, eos: list[int], pad: int,
    dtype: str = "float32", num_drafts: Mapping[str, int] = NUM_DRAFTS,
) -> Iterator[tuple[str, Decoder]]:  # fmt: skip
    """Decoders of Hugging Face, by method, in a process of their own: threads would compete.

    Args:
      target: a checkpoint's directory, as `dlm.save` writes it.
      draft: of the draft model of assisted generation; None: no such decoder.
      gen_len: most tokens to write.
      eos: ids that end a text.
      pad: padding.
      dtype: of weights and products.
      num_drafts: most drafts of a round, of "draft model" and "prompt lookup".

    Raises:
      ImportError: torch or transformers are not installed.
      ChildProcessError: the process has ended, of which it says why by itself.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed")
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe()
    arguments = there, target, draft, gen_len, eos, pad, dtype, num_drafts
    context.Process(target=_serve, args=arguments, daemon=True).start()
    there.close()  # so that a process that ends is noticed

    def answer() -> Any:
        try:
            return pipe.recv()
        except EOFError as error:
            raise ChildProcessError("the process of transformers has ended") from error

    def decoder(name: str) -> Decoder:
        def run(prompt: list[int]) -> tuple[list[int], int, float]:
            pipe.send((name, prompt))
            found: tuple[list[int], int, float] = answer()
            return found

        return run

    for name in answer():
        yield name, decoder(name)


def beside(
    lm: dlm.LanguageModel, draft: dlm.LanguageModel | None, gen_len: int,
    num_drafts: Mapping[str, int],
) -> dict[str, Decoder]:  # fmt: skip
    """Decoders of Hugging Face with the weights of models that are loaded here, by name.

    Args, and errors: as `theirs`.
    """
    with tempfile.TemporaryDirectory() as folder:  # read before the names of methods come
        paths = [pathlib.Path(folder) / name for name in ("target", "draft")]
        for path, model in zip(paths, (lm, draft), strict=True):
            if model is not None:
                dlm.save(path, model)
        found = theirs(
            paths[0], None if draft is None else paths[1], gen_len, list(lm.cfg.eos_ids),
            lm.cfg.pad_token_id, lm.cfg.dtype, num_drafts,
        )  # fmt: skip
        return {f"transformers, {name}": run for name, run in found}


def _serve(
    pipe: Connection, target: pathlib.Path, draft: pathlib.Path | None, gen_len: int,
    eos: list[int], pad: int, dtype: str, num_drafts: Mapping[str, int],
) -> None:  # fmt: skip
    """Says which methods there are, then decodes prompts that are sent, until nobody asks."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(path: pathlib.Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    model = load(target)
    options: dict[str, dict[str, Any]] = {"none": {}}
    if draft is not None:
        assistant = load(draft)
        assistant.generation_config.num_assistant_tokens = num_drafts["draft model"]
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options["draft model"] = {"assistant_model": assistant}
    options["prompt lookup"] = {
        "prompt_lookup_num_tokens": num_drafts["prompt lookup"],
        "max_matching_ngram_size": MAX_NGRAM,
    }
    calls = [0]
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    pipe.send([*options])
    while True:
        try:
            name, prompt = pipe.recv()
        except EOFError:
            return
        calls[0] = 0
        tokens = torch.tensor([prompt])
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=gen_len,
                do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=pad,
                **options[name],
            )  # fmt: skip
        seconds = time.perf_counter() - began
        pipe.send((out[0, len(prompt) :].tolist(), calls[0], seconds))


def alternate(
    decoders: dict[tuple[str, str], Decoder], prompts: list[list[int]]
) -> dict[tuple[str, str], Tally]:
    """Every prompt decoded by everyone before the next one is; by library and method."""
    for run in decoders.values():
        run(prompts[0])  # compiles, or warms up
    tallies = {key: Tally() for key in decoders}
    for prompt in tqdm(prompts, unit="prompt"):
        for key, run in decoders.items():
            tokens, forwards, seconds = run(prompt)
            tallies[key].texts.append(tokens)
            tallies[key].forwards.append(forwards)
            tallies[key].seconds.append(seconds)
    return tallies


def table(tallies: dict[tuple[str, str], Tally]) -> str:
    """A line per method and library."""
    plain = tallies["transformers", "none"]
    same = lambda t: sum(a == b for a, b in zip(t.texts, plain.texts, strict=True))  # noqa: E731
    rows = [
        {
            "drafter": name,
            "library": library,
            "same text": f"{same(t)}/{len(plain.texts)}",
            "forwards": f"{np.mean(t.forwards):.1f}",
            "tokens/s": f"{t.tokens_per_s:.0f}",
            "over transformers, plain": f"{t.tokens_per_s / plain.tokens_per_s:.2f}x",
        }
        for (library, name), t in sorted(tallies.items(), key=lambda item: item[0][::-1])
    ]
    return markdown(rows)
