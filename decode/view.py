"""A page that shows in which step each token was committed."""

from __future__ import annotations

import dataclasses
import html
import os
import pathlib
from collections.abc import Sequence

from decode.core.results import Completion
from dlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Answer:
    """One decoded answer to be shown.

    Attributes:
      prompt: the prompt as text; answers to equal prompts are shown together.
      method: how it was decoded, a short label.
      completion: the answer.
      verdict: whether it is right; None if that is not known.
    """

    prompt: str
    method: str
    completion: Completion
    verdict: bool | None = None


def write_commit_order(
    path: str | os.PathLike[str],
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    title: str = "Order of decoding",
) -> None:
    """Writes a self-contained HTML page of answers, token by token.

    Each token carries the step it was committed in (colour and number, a slider replays the steps)
    and how sure the model was (the bar below it). The page needs no network.

    Args:
      path: the HTML file to write.
      answers: what to show; those with equal prompts are grouped, in the order given.
      tokenizer: turns single ids into text.
      title: heading of the page.
    """
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    last_step = max((int(a.completion.step_map.max(initial=0)) for a in answers), default=0)
    sections = [
        f"<section><pre>{html.escape(prompt)}</pre>"
        + "".join(_answer_html(answer, tokenizer, last_step) for answer in group)
        + "</section>"
        for prompt, group in groups.items()
    ]
    page = _PAGE.format(title=html.escape(title), last_step=last_step, sections="\n".join(sections))
    pathlib.Path(path).write_text(page, encoding="utf-8")


def _answer_html(answer: Answer, tokenizer: Tokenizer, last_step: int) -> str:
    completion = answer.completion
    mark = {True: " ✓", False: " ✗", None: ""}[answer.verdict]
    chips = []
    for token, step, confidence in zip(
        completion.canvas, completion.step_map, completion.confidence, strict=True
    ):
        if step < 0:
            continue
        text = tokenizer.decode([int(token)], skip_special_tokens=False)
        hue = 220 - 200 * int(step) / max(last_step, 1)  # early: blue, late: red
        chips.append(
            f'<span class="t" data-s="{step}" style="--h:{hue:.0f};--c:{confidence:.4f}" '
            f'title="step {step}, confidence {confidence:.4f}"><i>{step}</i>'
            f"<b>{html.escape(text)}</b></span>"
        )
    return (
        f'<div class="a"><h3>{html.escape(answer.method)}<small>{mark} '
        f"{completion.num_forwards} forwards, "
        f"{completion.tokens_per_forward:.1f} tokens per forward</small></h3>"
        f"<p>{''.join(chips)}</p></div>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222; background: #fff }}
pre {{ white-space: pre-wrap; background: #f3f4f6; padding: .7rem 1rem; border-radius: 6px }}
section {{ margin-bottom: 2.5rem }}
h3 {{ margin: .8rem 0 .1rem; font-size: 1rem }}
small {{ font-weight: normal; color: #555; margin-left: .8rem }}
p {{ margin: 0; line-height: 2.9 }}
.t {{ display: inline-block; position: relative; margin: 0 2px 0 0; padding: 0 5px;
  line-height: 1.5;
  border-radius: 4px 4px 0 0; white-space: pre; background: hsl(var(--h) 85% 90%);
  border-bottom: 4px solid transparent;
  border-image: linear-gradient(90deg, hsl(var(--h) 70% 45%) calc(var(--c) * 100%),
    #ddd calc(var(--c) * 100%)) 1 }}
.t i {{ position: absolute; top: -1.05em; left: 2px; font: normal 10px sans-serif; color: #777 }}
.t b {{ font: inherit }}
.t.off b {{ visibility: hidden }}
.t.off {{ background: #eee; border-image: none; border-bottom-color: #eee }}
.bar {{ position: sticky; top: 0; background: #fff; padding: .6rem 0; z-index: 1;
  border-bottom: 1px solid #ddd }}
input {{ width: 22rem; vertical-align: middle }}
</style></head><body>
<h1>{title}</h1>
<div class="bar"><label>after step <output id="n">{last_step}</output>
<input id="r" type="range" min="-1" max="{last_step}" value="{last_step}"></label>
<button id="p">replay</button>
<small>number and colour: the step that committed a token; bar: how sure the model was</small></div>
{sections}
<script>
const r = document.getElementById("r"), n = document.getElementById("n");
function show() {{
  n.value = r.value < 0 ? "none" : r.value;
  for (const t of document.querySelectorAll(".t"))
    t.classList.toggle("off", +t.dataset.s > +r.value);
}}
r.addEventListener("input", show);
document.getElementById("p").addEventListener("click", () => {{
  r.value = -1; show();
  const timer = setInterval(() => {{
    r.value = +r.value + 1; show();
    if (+r.value >= +r.max) clearInterval(timer);
  }}, 350);
}});
</script></body></html>
"""
