"""Act two: a real model answers a question, alone and with every drafter that needs no training."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence

import dlm
from decode import complete
from decode.core.results import Completion
from decode.evaluation.run import device
from decode.evaluation.tables import markdown
from decode.speculative.points import METHODS
from dlm.hf.gguf import installed_smollm2

QUESTION = (
    "Summarise: The ship leaves the harbour at dawn. The captain "
    "watches the lighthouse while the crew sets the sails. The wind is strong and the sea is "
    "rough, but the ship is fast and the crew is brave. In the evening the ship reaches the "
    "island. The captain thanks the crew and the crew thanks the captain."
)
GEN_LEN = 128  # tokens at most
BAR = "|"


@dataclasses.dataclass(frozen=True)
class Row:
    """One drafter on the question.

    Attributes:
      drafter: its name; "plain": nobody drafts.
      is_same: whether the text is that of plain decoding.
      num_tokens: of the answer, its end aside.
      num_forwards: of the model.
      tokens_per_forward: of the answer.
      tokens_per_s: tokens behind the first forward over the time they took, shown as they came.
      compile_s: of compiling, or of reading programs from disk.
    """

    drafter: str
    is_same: bool
    num_tokens: int
    num_forwards: int
    tokens_per_forward: float
    tokens_per_s: float
    compile_s: float


def act_two(workdir: pathlib.Path, smoke: bool) -> None:
    """Shows all of it, and writes real_model.json; or says in one sentence why it is left out."""
    try:
        path = installed_smollm2()
    except FileNotFoundError as error:
        print(f"\nAct two, a real model, is left out: {error}.")
        return
    lm = dlm.load(path, dtype="float32")
    names = ["plain", *sorted(METHODS.keys() - {"plain"})]
    print(f"\nAct two: SmolLM2-135M-Instruct, float32, {device()}.\n\n> {QUESTION}")
    rows = (
        watch(lm, QUESTION, names[:2], gen_len=8) if smoke
        else watch(lm, QUESTION, names, gen_len=GEN_LEN)
    )  # fmt: skip
    about = {"model": path.name, "question": QUESTION, "device": device(), "dtype": lm.cfg.dtype}
    found = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    (workdir / "real_model.json").write_text(json.dumps(found, indent=1))
    print(f"\n{table(rows)}\n\nTalk to it, or to your own checkpoint:\n"
          "  python -m scripts.chat --checkpoint=smollm2 --stats")  # fmt: skip


def watch(lm: dlm.LanguageModel, question: str, names: Sequence[str], *, gen_len: int) -> list[Row]:
    """Answers with each drafter, the first of which is compared with, and shows how it is written.

    What one forward brings stands between two bars, if it may be more than a token.
    """
    assert lm.tokenizer is not None
    prompt = lm.tokenizer.apply_chat_template([{"role": "user", "content": question}])
    rows: list[Row] = []
    plain: Completion | None = None
    for name in names:
        print(f"\n-- {name}: compiling", end="", flush=True)
        compile_s = complete.warm_up(lm, prompt, method=name, gen_len=gen_len)
        print(f" took {compile_s:.1f} s")
        began, bar = 0.0, ""
        for piece in complete.stream_text(lm, prompt, method=name, gen_len=gen_len):
            began = began or time.perf_counter()
            print(bar + piece.text, end="", flush=True)
            bar = "" if METHODS[name].drafter.depth == 0 else BAR
            answer = piece.completion
        seconds = time.perf_counter() - began
        print()
        assert answer is not None
        plain = plain or answer
        later = len(answer.tokens) - int((answer.step_map[: len(answer.tokens)] == 0).sum())
        rows.append(
            Row(
                drafter=name, is_same=answer.text == plain.text, num_tokens=len(answer.tokens),
                num_forwards=answer.num_forwards, tokens_per_forward=answer.tokens_per_forward,
                tokens_per_s=later / seconds, compile_s=compile_s,
            )
        )  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    return markdown(
        [
            {
                "drafter": row.drafter,
                "same text": "yes" if row.is_same else "NO",
                "tokens": str(row.num_tokens),
                "forwards": str(row.num_forwards),
                "tokens/forward": f"{row.tokens_per_forward:.2f}",
                "tokens/s": f"{row.tokens_per_s:.1f}",
            }
            for row in rows
        ]
    )
