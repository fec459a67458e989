"""The model of lm-evaluation-harness, so that its tasks can be run here.

    from lm_eval import simple_evaluate

    model = HarnessModel(Answerer(lm=dlm.load("path/to/checkpoint"), method="klass"))
    simple_evaluate(model, tasks=["gsm8k"], limit=50)

`python -m scripts.lm_eval` does this. The extra `eval` is needed; `decode.evaluation.harness` does
the work, without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decode.evaluation.harness import Answerer
from decode.evaluation.requests import render_chat

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError(
        "lm-eval is not installed: install the extra, pip install -e '.[eval]'"
    ) from error


class HarnessModel(LM):
    """A language model as the harness sees it. One process: the harness splits nothing.

    Attributes:
      answerer: the language model, and how it is asked.
    """

    def __init__(self, answerer: Answerer) -> None:
        super().__init__()
        self.answerer = answerer

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts, of (context, generation settings)."""
        asked = [request.args for request in requests]
        texts = self.answerer.generate(asked, progress=not disable_tqdm)
        self._keep("generate_until", requests, texts)
        return texts

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it), of (context, continuation)."""
        found = self.answerer.score([request.args for request in requests])
        self._keep("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods, of (text,)."""
        found = self.answerer.score_texts([request.args[0] for request in requests])
        self._keep("loglikelihood_rolling", requests, found)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for a conversation, see `render_chat`."""
        return render_chat(self.answerer.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Its source, for the harness's log."""
        source = self.answerer.tokenizer.chat_template
        return source if isinstance(source, str) else str(source or "")

    @property
    def tokenizer_name(self) -> str:
        """What tells prompts of this model from those of others."""
        return self.answerer.about()["model"]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into the `config` of its results."""
        return self.answerer.about()

    def _keep(self, kind: str, requests: Sequence[Instance], answers: Sequence[Any]) -> None:
        """For the harness's own cache of answers, if it is on."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
