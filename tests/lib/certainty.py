"""What the card of certainty forcing says of a batch, in plain Python."""

import jax
import numpy as np

from tests.lib.objectives import make_batch
from tests.lib.oracle import Model

P = 5


def easy(params):
    """A model that says 0 to 3 only, so that it is often right about `batch_of`'s completions."""
    return params | {"unembed": params["unembed"].at[4:].multiply(0.05)}


def batch_of(cfg, completion_len, seed=0):
    """Four rows with prompts of other lengths, one of them empty if the model can do without."""
    batch = jax.device_get(make_batch(cfg, completion_len=completion_len, seed=seed))
    rng = np.random.default_rng(seed)
    batch["prompt_start"] = np.array([0, 2, 4, 1 if cfg.shifted_logits else 5], np.int32)
    batch["completion"] = rng.integers(0, 4, (4, completion_len)).astype(np.int32)
    return batch


def shown(cfg, tokens):
    """What is MASK in the two views of each row: [B, G] bool each."""
    first, second = np.split(np.asarray(tokens)[:, P:] == cfg.mask_token_id, 2)
    return first, second


def by_card(params, cfg, batch, tokens, temperature):
    """CE and ENT of both views, averaged over rows, and how often the model is right."""
    model, shift = Model(params, cfg), int(cfg.shifted_logits)
    views = np.split(np.asarray(tokens), 2)
    first, second = shown(cfg, tokens)
    cross_entropy, entropy, is_right = [], [], []
    for view, scored in zip(views, (first & ~second, second & ~first), strict=True):
        for row, start in enumerate(batch["prompt_start"]):
            seen = view[row, start:]
            z = model.logits(model.run(seen, range(len(seen)))[0])
            losses, entropies = [], []
            for i in np.flatnonzero(scored[row]):
                logits, y = z[P - start + i - shift], batch["completion"][row, i]
                losses.append(np.log(np.exp(logits).sum()) - logits[y])
                is_right.append(logits.argmax() == y)
                if is_right[-1]:
                    p = np.exp(logits / temperature)
                    p /= p.sum()
                    entropies.append(-(p * np.log(p + 1e-12)).sum())
            cross_entropy.append(np.mean(losses) if losses else 0.0)
            entropy.append(np.mean(entropies) if entropies else 0.0)
    ce = np.reshape(cross_entropy, (2, -1)).mean(axis=1)
    ent = np.reshape(entropy, (2, -1)).mean(axis=1)
    return ce, ent, np.mean(is_right)
