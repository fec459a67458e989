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

    def run(self, tokens, positions, context=None, allowed=None):
        """Hidden states [T, D] and per layer the (keys, values) of these T positions.

        `allowed` [T, S]: which keys (the context's first) each of them sees; None: all.
        """
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
            x = x + np.einsum("tnh,nhd->td", self.attend(q, k, v, allowed), a["o"])
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
    def attend(q, k, v, allowed=None):
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
        if allowed is not None:
            scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


def decode(
    model,
    prompt,
    gen_len,
    *,
    rule,
    scheduler,
    cache="none",
    confidence="probability",
    reviser=("keep",),
    stopper=("filled",),
    temperature=None,
    guidance=None,
    banned=(),
    seed=0,
):
    """Decodes one prompt. Components are tuples such as ("threshold", 0.9), ("fixed", 32).

    Returns a dict of tokens, step_map, num_forwards, confidence and log_prob.
    """
    cfg, P = model.cfg, len(prompt)
    canvas = list(prompt) + [cfg.mask_token_id] * gen_len
    step_map = [-1] * gen_len
    report = {"confidence": [0.0] * gen_len, "log_prob": [0.0] * gen_len}
    step, low, end = 0, 0, gen_len
    high = _opened(scheduler, low, end)
    block_step, memory, traces = 0, None, {}
    masks = lambda first, last: [g for g in range(first, last) if step_map[g] < 0]
    while low < end:
        if block_step == 0:
            memory, traces = None, {g: {} for g in range(gen_len)}
            notes = {"last": 30}  # what scheduler and reviser remember of the block
        hidden, memory, shadow = _judge(model, canvas, P, low, high, cache, guidance, memory, end)
        seen = {  # the whole canvas at a refresh, else what was recomputed
            g: _propose(model, h, banned, confidence, temperature, (seed, step, g), traces[g], mask)
            for g, h in hidden.items()
            if (low <= g < high or stopper[0] == "prophet")
            for mask in [step_map[g] < 0 and low <= g < high]
        }
        eligible = masks(low, high)
        high, eligible = _focus(
            scheduler, seen, eligible, low, high, end, block_step, step_map, notes
        )
        if block_step == 0:
            num_open = len(masks(low, high))
        choices = {g: seen[g] for g in eligible}
        commits = _commit(rule, choices, block_step, num_open) if choices else []
        fills = stopper[0] == "prophet" and _answer_is_clear(stopper, seen, step, gen_len, end)
        back, held = [], False
        if fills:
            commits = masks(0, end)
        else:
            back, held = _revise(
                reviser, model, canvas, P, low, high, step_map, shadow, commits, banned, notes
            )
        for g in commits:
            canvas[P + g], step_map[g] = seen[g]["token"], step
            report["confidence"][g] = seen[g]["confidence"]
            report["log_prob"][g] = seen[g]["log_prob"]
        for g in back:
            canvas[P + g], step_map[g] = cfg.mask_token_id, -1
        step, block_step = step + 1, block_step + 1
        is_full = not masks(low, high) and not held
        if is_full and not masks(0, end):
            break
        if stopper[0] == "eos" and _text_ended(canvas[P:], step_map, cfg.eos_token_id):
            break
        if stopper[0] == "eos_block" and is_full and cfg.eos_token_id in canvas[P : P + high]:
            break
        start = low
        low, high = _advanced(scheduler, low, high, end, is_full, masks)
        if low != start:
            block_step = 0
    num_forwards = step * (1 if guidance is None else 2)
    return {"tokens": canvas[P:], "step_map": step_map, "num_forwards": num_forwards, **report}


def _opened(scheduler, low, end):
    """Where the block that starts at `low` stops, as far as is known before its first forward."""
    name, block_len, *rest = scheduler
    if name == "adablock":
        share = rest[0]
        return min(low + max(block_len, int(share * end)), end)
    if name == "slow_fast":
        return min((low // block_len + 1) * block_len, end)
    return min(low + block_len, end)


def _focus(scheduler, seen, eligible, low, high, end, block_step, step_map, notes):
    """Once proposals are known: where the block stops, and which positions may be committed."""
    name, block_len, *rest = scheduler
    if name == "adablock" and block_step == 0:
        share, bar, delimiters = rest
        ahead = [g for g in range(low, low + min(int(share * end), end - low))]
        ahead = [g for g in ahead if seen[g]["token"] in delimiters]
        best = max(ahead, key=lambda g: (seen[g]["log_prob"], -g), default=None)
        high = min(low + block_len, end)
        if best is not None and math.exp(seen[best]["log_prob"]) >= bar:
            high = best + 1
        return high, [g for g in eligible if g < high]
    if name == "sub_blocks":
        part = lambda g: (g - low) // rest[0]
        return high, [g for g in eligible if part(g) == part(eligible[0])]
    if name == "multi_block":
        _, _, active_at, gate = rest

        def may(g):
            first = g // block_len * block_len
            before = [step_map[i] >= 0 for i in range(first - block_len, first)]
            active = first == low or np.mean(before) >= active_at
            return active or seen[g]["confidence"] >= gate

        return high, [g for g in eligible if may(g)]
    if name == "slow_fast" and block_step < rest[0]:
        explore, floor = rest
        if "stretch" not in notes:
            far = [g + 1 for g in eligible if seen[g]["confidence"] >= floor]
            notes["far"] = [*notes.get("far", []), max(far, default=low + 1)][-2:]
            if len(notes["far"]) == 2 and np.std(notes["far"]) < 1:
                notes["stretch"] = notes["far"][1]
            elif block_step == explore - 1:
                notes["stretch"] = int(np.mean(notes["far"]))
        if block_step == explore - 1:
            high = notes["stretch"]
    return high, eligible


def _advanced(scheduler, low, high, end, is_full, masks):
    name, block_len, *rest = scheduler
    if name != "multi_block":
        return (high, _opened(scheduler, high, end)) if is_full else (low, high)
    max_open, open_at, *_ = rest
    last = (high - 1) // block_len * block_len
    done = 1 - len(masks(last, high)) / (high - last)
    while low < high and not masks(low, min(low + block_len, end)):
        low = min(low + block_len, end)
    if done >= open_at:
        high += block_len
    return low, min(max(high, low + block_len), low + max_open * block_len, end)


def _answer_is_clear(stopper, seen, step, gen_len, end):
    _, first, length, early, mid, late = stopper
    gaps = [seen[g]["gap"] for g in range(first, min(first + length, end))]
    progress = (step + 1) / gen_len
    bar = early if progress < 0.33 else mid if progress < 0.67 else late
    return bool(gaps) and np.mean(gaps) >= bar


def _revise(reviser, model, canvas, P, low, high, step_map, shadow, commits, banned, notes):
    """Positions to take back, and whether the block stays open though it is full."""
    if reviser[0] == "keep":
        return [], False
    assert reviser[0] == "wino"
    sure = {}
    for g in range(low, high):
        if step_map[g] >= 0:
            z = model.logits(shadow(g))
            z[list(banned)] = -np.inf
            sure[g] = _softmax(z)[canvas[P + g]]
    fails = sorted((g for g in sure if sure[g] < reviser[1]), key=lambda g: (sure[g], g))
    limit = notes["last"] - 1 if len(commits) > 1 else 0
    notes["last"] = len(commits)
    return fails[:limit], False


def _judge(model, canvas, P, low, high, cache, guidance, memory, end):
    """Hidden states that predict positions, what later steps of the block reuse, and the shadow."""
    shift, mask = int(model.cfg.shifted_logits), model.cfg.mask_token_id
    canvas = canvas[: P + end]
    blind = [mask] * P + canvas[P:]
    views = [canvas] if guidance is None else [canvas, blind]
    hidden, remembered, shadows = [], [], []
    for i, tokens in enumerate(views):
        if memory is None or cache == "none":
            first, stop, context = 0, len(tokens), None
            h, kv = model.run(tokens, range(len(tokens)))
            window = {g: h[P + g - shift] for g in range(end)}
            remembered.append((kv, h[P + low - 1]))
        else:
            kv, boundary = memory[i]
            first, stop = P + low, len(tokens) if cache == "prefix" else P + high
            outside = [*range(first), *range(stop, len(tokens))]
            context = [(k[outside], v[outside]) for k, v in kv]
            h, _ = model.run(tokens[first:stop], range(first, stop), context)
            h = np.concatenate([boundary[None], h])[1 - shift :]
            window = {g: h[P + g - first] for g in range(low, stop - P)}
            remembered.append(memory[i])
        hidden.append(window)
        shadows.append((tokens, first, stop, context))

    def shadow(g):
        """The hidden state of the shadow at position g."""
        out = []
        for tokens, first, stop, context in shadows:
            n, W = stop - first, high - low
            outside = 0 if context is None else len(context[0][0])
            allowed = np.ones((n + W, outside + n + W), bool)
            allowed[:n, outside + n :] = False
            for j in range(W):
                allowed[n + j, outside + P + low + j - first] = False
            places = [*range(first, stop), *range(P + low, P + high)]
            h, _ = model.run(tokens[first:stop] + [mask] * W, places, context, allowed)
            out.append(h[n + g - low])
        return out[0] if guidance is None else out[1] + (guidance + 1) * (out[0] - out[1])

    if guidance is None:
        return hidden[0], remembered, shadow
    mixed = {g: hidden[1][g] + (guidance + 1) * (hidden[0][g] - hidden[1][g]) for g in hidden[0]}
    return mixed, remembered, shadow


def _propose(model, hidden, banned, confidence, temperature, stream, trace, is_mask):
    z = model.logits(hidden)
    z[list(banned)] = -np.inf
    p = _softmax(z)
    raw = p
    if confidence == "credit":
        alpha, gamma, beta = 0.7, 0.2, 0.8
        credit = beta * trace.get("credit", np.zeros(len(z)))
        if is_mask:
            credit[z.argmax()] += p.max() ** gamma
        trace["credit"] = credit
        z = z + alpha * np.log1p(credit)
        p = _softmax(z)
    token = int(z.argmax())
    if temperature is not None:
        noise = gumbel_noise(_key(*stream)[None], jnp.arange(len(z)))
        token = int((z + temperature * np.asarray(noise[0], np.float64)).argmax())
    first, second = np.sort(p)[::-1][:2]
    best, runner_up = np.sort(raw)[::-1][:2]
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
        "gap": math.log(best) - math.log(runner_up),
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
