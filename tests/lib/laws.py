"""The law of a small model's texts, token for token, and how far what is drawn is from it."""

import dataclasses

import numpy as np

from decode.core.sampling import Sampling
from decode.speculative.loop import SpeculativeMethod
from dlm.config import ModelConfig
from dlm.params import Params
from tests.lib.models import laws_of, random_model
from tests.lib.speculation import run, texts

TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Enumerated:
    """A model of few tokens, a prompt, and how likely each text behind it is.

    Attributes:
      law: [V, ..., V], G times. Of texts of G tokens.
    """

    cfg: ModelConfig
    params: Params
    prompt: list[int]
    law: np.ndarray

    def distance(self, drafter, rule, num, controller=None):
        """Of `num` texts, chi-square less its mean, in standard deviations; and drafts accepted.

        Texts that are hardly to be expected are counted together.
        """
        V, G = self.law.shape[0], self.law.ndim
        method = SpeculativeMethod(drafter, rule, Sampling(TEMPERATURE), controller=controller)
        prompts = [self.prompt] * num
        state = run(self.params, self.cfg, method, prompts, gen_len=G, seeds=range(num))
        cells = np.ravel_multi_index(np.array(texts(state, num)).T, (V,) * G)
        counts, expected = np.bincount(cells, minlength=V**G), self.law.reshape(-1) * num
        there = expected > 5
        pool = lambda x: np.append(x[there], x[~there].sum())
        seen, wanted = pool(counts), pool(expected)
        chi_square = ((seen - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
        histogram = np.asarray(state.acceptance_histogram).sum(axis=0)
        accepted = (histogram * np.arange(len(histogram))).sum() / num
        return (chi_square - there.sum()) / np.sqrt(2 * there.sum()), accepted


def enumerated(cfg: ModelConfig, num_tokens: int, gen_len: int, seed: int = 3) -> Enumerated:
    """A random model like `cfg` with so many tokens, and all of its texts of `gen_len`."""
    cfg = dataclasses.replace(
        cfg, vocab_size=num_tokens, mask_token_id=None, eos_token_id=None, pad_token_id=0
    )
    params = random_model(seed, cfg)
    params = params | {"unembed": 0.4 * params["unembed"]}  # little is certain
    prompt, law = [1, 3, 0, 2], np.ones((num_tokens,) * gen_len)
    for text in np.ndindex(law.shape[:-1]):
        ahead = laws_of(params, cfg, [*prompt, *text], TEMPERATURE)[len(prompt) - 1 :]
        law[text] = np.prod([ahead[i][token] for i, token in enumerate(text)]) * ahead[gen_len - 1]
    return Enumerated(cfg, params, prompt, law)
