"""A plain-Python decoder for one prompt, written from the method descriptions, not from the loop.

float64 numpy throughout: a transformer that is handed its visible keys explicitly, and the decoding
loops of LLaDA, Fast-dLLM and Dream as their papers state them. Only random noise is shared with the
library, because noise has no specification but its own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.unembed_stats import gumbel_noise, threefry2x32


class Model:
    """Runs one row; `context` holds keys and values of positions that are not recomputed."""

    def __init__(self, params, cfg):
        self.cfg = cfg
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def run(self, tokens, positions, context=None):
        """Hidden states [T, D] and per layer the (keys, values) of these T positions."""
        p, cfg = self.params, self.cfg
        x, written = p["embed"][np.asarray(tokens)], []
        frequency = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        angle = np.asarray(positions)[:, None, None] * frequency
        for i in range(cfg.n_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
            a, h = layer["attention"], self.norm(x, layer["attention_norm"])
            q, k, v = (np.einsum("td,nhd->tnh", h, a[name]) for name in "qkv")
            if cfg.qkv_bias:
                q, k, v = q + a["q_bias"], k + a["k_bias"], v + a["v_bias"]
            q, k = self.rotate(q, angle), self.rotate(k, angle)
            written.append((k, v))
            if context is not None:
                k, v = (np.concatenate([c, new]) for c, new in zip(context[i], (k, v), strict=True))
            x = x + np.einsum("tnh,nhd->td", self.attend(q, k, v), a["o"])
            h, m = self.norm(x, layer["mlp_norm"]), layer["mlp"]
            gate = h @ m["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"])) @ m["down"]
        return self.norm(x, p["final_norm"]), written

    def logits(self, hidden):
        p = self.params
        return hidden @ (p["unembed"] if "unembed" in p else p["embed"]).T

    def norm(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.cfg.norm_eps) * weight

    @staticmethod
    def rotate(x, angle):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
        )

    @staticmethod
    def attend(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


def decode(
    model,
    prompt,
    gen_len,
    *,
    block_len,
    rule,
    cache="none",
    confidence="probability",
    stopper="filled",
    temperature=None,
    guidance=None,
    banned=(),
    seed=0,
):
    """Decodes one prompt. `rule` is a tuple such as ("threshold", 0.9).

    Returns a dict of tokens, step_map, num_forwards, confidence and log_prob.
    """
    cfg, P = model.cfg, len(prompt)
    canvas = list(prompt) + [cfg.mask_token_id] * gen_len
    step_map = [-1] * gen_len
    report = {"confidence": [0.0] * gen_len, "log_prob": [0.0] * gen_len}
    step = 0
    stopped = False
    for low in range(0, gen_len, block_len):
        high = min(low + block_len, gen_len)
        num_open, block_step, memory = high - low, 0, None
        traces = {g: {} for g in range(low, high)}  # what rules and confidences remember
        while any(step_map[g] < 0 for g in range(low, high)) and not stopped:
            hidden, memory = _judge(model, canvas, P, low, high, cache, guidance, memory)
            choices = {}
            for g in range(low, high):
                if step_map[g] < 0:
                    choices[g] = _propose(
                        model,
                        hidden[g - low],
                        banned,
                        confidence,
                        temperature,
                        (seed, step, g),
                        traces[g],
                    )
            for g in _commit(rule, choices, block_step, num_open):
                canvas[P + g], step_map[g] = choices[g]["token"], step
                report["confidence"][g] = choices[g]["confidence"]
                report["log_prob"][g] = choices[g]["log_prob"]
            step, block_step = step + 1, block_step + 1
            stopped = stopper == "eos" and _text_ended(canvas[P:], step_map, cfg.eos_token_id)
    num_forwards = step * (1 if guidance is None else 2)
    return {"tokens": canvas[P:], "step_map": step_map, "num_forwards": num_forwards, **report}


def _judge(model, canvas, P, low, high, cache, guidance, memory):
    """Hidden states that predict positions low..high, and what later steps of the block reuse."""
    shift = int(model.cfg.shifted_logits)
    blind = [model.cfg.mask_token_id] * P + canvas[P:]
    views = [canvas] if guidance is None else [canvas, blind]
    hidden, remembered = [], []
    for i, tokens in enumerate(views):
        if memory is None or cache == "none":
            h, kv = model.run(tokens, range(len(tokens)))
            window = h[P + low - shift : P + high - shift]
            remembered.append((kv, h[P + low - 1]))
        else:
            kv, boundary = memory[i]
            stop = len(tokens) if cache == "prefix" else P + high
            outside = [*range(P + low), *range(stop, len(tokens))]
            context = [(k[outside], v[outside]) for k, v in kv]
            h, _ = model.run(tokens[P + low : stop], range(P + low, stop), context)
            window = np.concatenate([boundary[None], h])[1 - shift :][: high - low]
            remembered.append(memory[i])
        hidden.append(window)
    if guidance is None:
        return hidden[0], remembered
    return hidden[1] + (guidance + 1) * (hidden[0] - hidden[1]), remembered


def _propose(model, hidden, banned, confidence, temperature, stream, trace):
    z = model.logits(hidden)
    z[list(banned)] = -np.inf
    p = _softmax(z)
    raw = p
    if confidence == "credit":
        alpha, gamma, beta = 0.7, 0.2, 0.8
        credit = beta * trace.get("credit", np.zeros(len(z)))
        credit[z.argmax()] += p.max() ** gamma
        trace["credit"] = credit
        z = z + alpha * np.log1p(credit)
        p = _softmax(z)
    token = int(z.argmax())
    if temperature is not None:
        noise = gumbel_noise(_key(*stream)[None], jnp.arange(len(z)))
        token = int((z + temperature * np.asarray(noise[0], np.float64)).argmax())
    first, second = np.sort(p)[::-1][:2]
    entropy = -sum(x * math.log(x) for x in raw if x > 0)
    if "p" in trace:
        kl = sum(x * math.log(x / y) for x, y in zip(raw, trace["p"], strict=True) if x > 0)
        trace["kls"] = [*trace["kls"], kl]
    trace.setdefault("kls", [])
    trace["p"] = raw
    sure = {
        "probability": lambda: p[token],
        "credit": lambda: p[token],
        "margin": lambda: first - second,
        "neg_entropy": lambda: math.exp(-entropy),
        "random": lambda: _uniform(_key(*stream)),
    }[confidence]()
    return {
        "token": token,
        "confidence": sure,
        "log_prob": math.log(raw[token]),
        "entropy": entropy,
        "kls": trace["kls"],
    }


def _softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def _commit(rule, choices, block_step, num_open):
    """Positions to commit, from the open ones."""
    name, value = rule
    order = sorted(choices, key=lambda g: (-choices[g]["confidence"], g))
    if name == "quota":
        quota = num_open // value + (1 if block_step < num_open % value else 0)
        return order[: max(quota, 1)]
    if name == "threshold":
        return order[:1] + [g for g in order[1:] if choices[g]["confidence"] >= value]
    if name == "factor":
        n = 1
        while n < len(order) and (n + 2) * (1 - choices[order[n]]["confidence"]) <= value:
            n += 1
        return order[:n]
    if name == "entropy":
        order = sorted(choices, key=lambda g: (choices[g]["entropy"], g))
        return order[:1] + [g for g in order[1:] if choices[g]["entropy"] <= value]
    if name == "local_leap":
        bar, relaxed, radius = value
        anchors = [g for g in choices if choices[g]["confidence"] >= bar]
        near = {g for g in choices if any(abs(g - a) <= radius for a in anchors)}
        passes = [g for g in near if choices[g]["confidence"] >= relaxed]
        return sorted({*anchors, *passes}) or order[:1]
    if name == "hierarchical":
        bar, low = value
        sure = {g: choices[g]["confidence"] for g in choices}
        runs = []
        for g in sorted(sure):
            if g - 1 not in sure:
                runs.append([])
            runs[-1].append(g)
        best = {
            g for run in runs for g in run if sure[g] == max(sure[i] for i in run) and sure[g] > low
        }
        return sorted(best | {g for g in sure if sure[g] > bar}) or order[:1]
    if name == "klass":
        bar, max_kl, history = value
        stable = lambda kls: len(kls) >= history and all(kl < max_kl for kl in kls[-history:])
        passes = [
            g for g in choices if choices[g]["confidence"] > bar and stable(choices[g]["kls"])
        ]
        return passes or order[:1]
    if name == "entropy_budget":
        order = sorted(choices, key=lambda g: (choices[g]["entropy"], g))
        n = 1
        while n < len(order) and sum(choices[g]["entropy"] for g in order[:n]) <= value:
            n += 1
        return order[:n]
    assert name == "dream"
    time = np.linspace(1, 1e-3, value + 1)
    last = block_step >= value - 1
    n = len(order) if last else int(len(order) * (1 - time[block_step + 1] / time[block_step]))
    return order[: max(n, 1)]


def _text_ended(completion, step_map, eos):
    for token, step in zip(completion, step_map, strict=True):
        if step < 0:
            return False
        if token == eos:
            return True
    return False


def _key(seed, step, position):
    key = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    row = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step)
    return jax.random.key_data(jax.random.fold_in(row, position))


def _uniform(key):
    bits, _ = threefry2x32(key[0], key[1], jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    return (float(bits >> 9) + 0.5) * 2.0**-23
