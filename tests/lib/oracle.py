"""A plain-Python decoder for one prompt, written from the method descriptions, not from the loop.

float64 numpy throughout: a transformer that is handed its visible keys explicitly, and the decoding
loops as their papers state them. Only random noise is shared with the
library, because noise has no specification but its own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from decode.core.streams import Stream
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


def proposals(model, hidden_at):
    """The probability and id of the best token but MASK, by position; of final hidden states."""
    found = {}
    for i, hidden in hidden_at.items():
        z = model.logits(hidden)
        z[model.cfg.mask_token_id] = -np.inf
        p = np.exp(z - z.max())
        found[i] = (p.max() / p.sum(), int(z.argmax()))
    return found


def sure(proposed, threshold):
    """Positions of which a threshold commits the proposal: those that reach it, or the best one."""
    best = max(proposed, key=lambda i: (proposed[i][0], -i))
    return [i for i, (p, _) in proposed.items() if p >= threshold or i == best]


def decode(
    model,
    prompt,
    gen_len,
    *,
    rule,
    scheduler,
    cache=("none",),
    confidence="probability",
    reviser=("keep",),
    stopper=("filled",),
    constraint=None,
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
    law = lambda hidden: _law(model, hidden, banned, constraint, temperature)
    while low < end:
        if block_step == 0:
            memory, traces = None, {g: {} for g in range(gen_len)}
            notes = {"accepted": 30, "made": 0, "taken": 0, "rounds": 0, "recorded": {}}
        hidden, memory, hide = _judge(model, canvas, P, low, high, cache, guidance, memory, end)
        first, last = {"prophet": (0, end), "predicted": (low, end)}.get(
            stopper[-1] if stopper[0] == "eotp" else stopper[0], (low, high)
        )
        seen = {}
        for g in range(first, last):
            within = low <= g < high
            flags = within, within and step_map[g] < 0
            seen[g] = _propose(
                law(hidden[g]), confidence, temperature, (seed, step, g), traces[g], flags,
                block_step,
            )  # fmt: skip
        eligible = masks(low, high)
        high, eligible = _focus(
            scheduler, seen, eligible, low, high, end, block_step, step_map, notes
        )
        if block_step == 0:
            num_open = len(masks(low, high))
        choices = {g: seen[g] for g in eligible}
        commits = _commit(rule, choices, block_step, num_open) if choices else []
        if stopper[0] == "prophet" and _answer_is_clear(stopper, seen, step, gen_len, end):
            commits, back, held = masks(0, end), [], False
        else:
            round_ = {
                "seen": seen, "choices": choices, "commits": commits, "block_step": block_step,
                "block": range(low, high), "decided": set(range(low, high)) - {*masks(low, high)},
                "num_open": num_open, "tokens": canvas[P:], "notes": notes,
                "sure_in_shadow": (
                    lambda g, hide=hide: _log_softmax(law(hide(g)))[canvas[P + g]]
                ),
            }  # fmt: skip
            commits, back, held = _revise(reviser, round_)
        for g in commits:
            canvas[P + g], step_map[g] = seen[g]["token"], step
            report["confidence"][g] = seen[g]["confidence"]
            report["log_prob"][g] = seen[g]["log_prob"]
        for g in back:
            canvas[P + g], step_map[g] = cfg.mask_token_id, -1
        step, block_step = step + 1, block_step + 1
        if stopper[0] == "eotp":
            end = min(end, _cut(stopper, seen, commits, masks(low, end), end))
            high = min(high, end)
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
    report = {name: values[:end] for name, values in report.items()}
    tokens, step_map = canvas[P : P + end], step_map[:end]
    return {"tokens": tokens, "step_map": step_map, "num_forwards": num_forwards, **report}


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
        if best is not None and seen[best]["log_prob"] >= _log(bar):
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
            return active or seen[g]["log"] >= _log(gate)

        return high, [g for g in eligible if may(g)]
    if name == "slow_fast" and block_step < rest[0]:
        explore, floor = rest
        if "stretch" not in notes:
            far = [g + 1 for g in eligible if seen[g]["log"] >= _log(floor)]
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


def _cut(stopper, seen, commits, masks, end):
    """EoTP: where the row ends from now on; the rule's commits first, then what is hoped for."""
    _, eot, cut_at = stopper
    said = [g for g in commits if seen[g]["token"] == eot]
    if said:
        return min(said) + 1
    hoped = [g for g in masks if g not in commits and g in seen and seen[g]["token"] == eot]
    if cut_at == "committed" or not hoped:
        return end
    return max(hoped, key=lambda g: (seen[g]["log"], -g)) + 1


def _revise(reviser, r):
    """What is committed after all, what is taken back, and whether the full block stays open."""
    name, *numbers = reviser
    seen, commits, notes, decided = r["seen"], r["commits"], r["notes"], r["decided"]
    recorded = notes["recorded"]
    left = lambda commits: len({*r["block"]} - decided - {*commits})
    if name == "wino":
        sure = {g: r["sure_in_shadow"](g) for g in decided}
        fails = sorted((g for g in sure if sure[g] < _log(numbers[0])), key=lambda g: (sure[g], g))
        limit = notes["accepted"] - 1 if len(commits) > 1 else 0
        notes["accepted"] = len(commits)
        return commits, fails[:limit], False
    if name == "token_edit":
        threshold, max_rounds = numbers
        was_full = len(decided) == len(r["block"])
        notes["rounds"] += was_full
        edits = [
            g
            for g in decided
            if seen[g]["token"] != r["tokens"][g] and seen[g]["log_prob"] > _log(threshold)
        ]
        if was_full and notes["rounds"] > max_rounds:
            edits = []
        settled = was_full and not edits
        held = not left(commits) and not settled and notes["rounds"] < max_rounds
        return commits + edits, [], held
    if name == "remask":
        rounds, count, after = numbers
        if notes["taken"]:
            order = sorted(r["choices"], key=lambda g: (-seen[g]["log"], g))
            commits = order[: notes["taken"]]
        recorded |= {g: seen[g]["log"] for g in commits}
        few = r["num_open"] - max(int(after * r["num_open"]), 1)
        due = notes["made"] > 0 or left(commits) <= few
        stand = [g for g in recorded if g in r["block"] and (g in decided or g in commits)]
        weakest = sorted(stand, key=lambda g: (recorded[g], g))[:count]
        back = weakest if due and notes["made"] < rounds else []
        notes["made"] += due and notes["made"] < rounds
        notes["taken"] = len(back)
        return commits, back, False
    if name == "running_confidence":
        recorded |= {g: seen[g]["log"] for g in r["choices"]}
        running = {g: recorded.get(g, math.inf) for g in {*decided, *r["choices"]}}
        stays = sorted(running, key=lambda g: (-running[g], g))[: len(decided) + len(commits)]
        return (
            [g for g in r["choices"] if g in stays],
            [g for g in decided if g not in stays],
            False,
        )
    if name == "remdm":
        steps, eta = numbers
        i = min(r["block_step"], steps - 1)
        alpha, after = i / steps, (i + 1) / steps
        sigma = min(eta, 1 if i == 0 else min(1, (1 - after) / alpha))
        decide = (after - (1 - sigma) * alpha) / (1 - alpha)
        places = {*r["block"], *r["choices"]}
        chance = {g: _uniform(_key(*seen[g]["stream"]), Stream.REMDM) for g in places}
        commits = [g for g in r["choices"] if chance[g] < decide]
        back = [g for g in decided if chance[g] < sigma]
        return commits, back, r["block_step"] + 1 < steps
    assert name == "keep"
    return commits, [], False


def _judge(model, canvas, P, low, high, cache, guidance, memory, end):
    """Hidden states that predict positions, what later steps of the block reuse, and the shadow."""
    shift, mask = int(model.cfg.shifted_logits), model.cfg.mask_token_id
    canvas = canvas[: P + end]
    blind = [mask] * P + canvas[P:]
    views = [canvas] if guidance is None else [canvas, blind]
    if cache[0] == "delayed":
        hidden, memory = _judge_delayed(model, canvas, views, P, cache[1], memory)
        shadow = None
    else:
        hidden, remembered, parts = [], [], []
        S = len(canvas)
        first, stop = {
            "none": (0, S),
            "prefix": (P + low, S),
            "dual": (P + low, P + high),
            "vicinity": (max(P + low - sum(cache[1:2]), 0), min(P + high + sum(cache[2:]), S)),
        }[cache[0]]
        if memory is None or cache[0] == "none":
            first, stop = 0, S
        for i, tokens in enumerate(views):
            kv, old = (None, []) if first == 0 and stop == S else memory[i]
            outside = [*range(first), *range(stop, S)]
            context = [(k[outside], v[outside]) for k, v in kv] if outside else None
            h, new = model.run(tokens[first:stop], range(first, stop), context)
            hidden.append(dict(enumerate(old)) | dict(zip(range(first, stop), h, strict=True)))
            remembered.append((new, h) if memory is None else memory[i])
            parts.append((tokens, first, stop, context))
        memory = remembered
        shadow = lambda g: _shadow(model, parts, P, low, high, guidance, g)

    mix = lambda out: out[0] if guidance is None else out[1] + (guidance + 1) * (out[0] - out[1])
    places = [g for g in range(end) if all(P + g - shift in h for h in hidden)]
    return {g: mix([h[P + g - shift] for h in hidden]) for g in places}, memory, shadow


def _shadow(model, parts, P, low, high, guidance, g):
    """The hidden state of MASK at position g, seeing everything but what stands there."""
    out, mask = [], model.cfg.mask_token_id
    for tokens, first, stop, context in parts:
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


def _judge_delayed(model, canvas, views, P, refresh_every, memory):
    """dKV-Cache: keys and values per position, kept one step after its token was decided.

    A position whose token has changed since, or that the row has lost, makes all of them stale.
    """
    S, shift, mask = len(canvas), int(model.cfg.shifted_logits), model.cfg.mask_token_id
    known = lambda p: p < P or p >= S or canvas[p] != mask
    settled = [p for p in range(S) if known(p) and (not shift or known(p + 1))]
    age, stores, last = memory or (0, None, [{} for _ in views])
    if stores is not None:
        stale = any(p not in settled or canvas[p] != token for p, (token, _) in stores[0].items())
    if stores is None or age >= refresh_every or stale:
        age, stores = 0, [{} for _ in views]
    for tokens, store, hidden in zip(views, stores, last, strict=True):
        todo = [p for p in range(S) if p not in store]
        context = None
        if store:
            pick = lambda i, j, store=store: np.stack([kv[i][j] for _, kv in store.values()])
            context = [(pick(i, 0), pick(i, 1)) for i in range(model.cfg.n_layers)]
        h, kv = model.run([tokens[p] for p in todo], todo, context) if todo else ([], [])
        hidden |= dict(zip(todo, h, strict=True))
        for n, p in enumerate(todo):
            if p in settled:
                store[p] = canvas[p], [(k[n], v[n]) for k, v in kv]
    return [dict(hidden) for hidden in last], (age + 1, stores, last)


def _law(model, hidden, banned, constraint, temperature):
    """Logits, without what is not allowed."""
    z = model.logits(hidden)
    z[list(banned)] = -np.inf
    if constraint is not None:
        _, top_p, top_k = constraint
        p = _softmax(z if temperature is None else z / temperature)
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        keep = order[(before <= top_p) & (np.arange(len(z)) < top_k)]
        z = np.where(np.isin(np.arange(len(z)), keep), z, -np.inf)
    return z


def _propose(z, confidence, temperature, stream, trace, flags, block_step):
    """A position's proposal; `flags`: it is in the block, and undecided there."""
    in_block, gains = flags
    log_p = raw = _log_softmax(z)
    if confidence == "credit":
        alpha, gamma, beta = 0.7, 0.2, 0.8
        credit = beta * trace.get("credit", np.zeros(len(z)))
        if gains:
            credit[z.argmax()] += math.exp(raw.max()) ** gamma
        trace["credit"] = credit
        z = z + alpha * np.log1p(credit)
        log_p = _log_softmax(z)
    token = int(z.argmax())
    if temperature is not None or confidence == "annealed":
        heat = temperature or 0.8 + (0.4 - 0.8) * min(block_step / 7, 1)
        noise = gumbel_noise(_key(*stream)[None], jnp.arange(len(z)))
        token = int((z + heat * np.asarray(noise[0], np.float64)).argmax())
    if confidence == "tempered":  # the margin of what is drawn from
        log_p = _log_softmax(z if temperature is None else z / temperature)
    first, second = np.sort(log_p)[::-1][:2]
    best, runner_up = np.sort(raw)[::-1][:2]
    entropy = -sum(math.exp(x) * x for x in raw if x > -math.inf)
    if "log_p" in trace:
        pairs = [(x, y) for x, y in zip(raw, trace["log_p"], strict=True) if x > -math.inf]
        trace["kls"] = [*trace["kls"], sum(math.exp(x) * (x - y) for x, y in pairs)]
    trace.setdefault("kls", [])
    if in_block:
        trace["log_p"] = raw
    log = {
        "probability": lambda: log_p[token],
        "credit": lambda: log_p[token],
        "annealed": lambda: log_p[token],
        "margin": lambda: first + _log(-math.expm1(second - first)),
        "tempered": lambda: first + _log(-math.expm1(second - first)),
        "neg_entropy": lambda: -entropy,
        "random": lambda: _log(_uniform(_key(*stream), Stream.RANDOM)),
    }[confidence]()
    return {
        "token": token,
        "log": log,
        "confidence": math.exp(log),
        "log_prob": raw[token],
        "entropy": entropy,
        "gap": best - runner_up,
        "kls": trace["kls"],
        "stream": stream,
    }


def _log(x):
    return math.log(x) if x > 0 else -math.inf


def _log_softmax(z):
    """Without losing what is left of probabilities close to one."""
    best = z.argmax()
    others = np.exp(np.delete(z, best) - z[best]).sum()
    return z - z[best] - math.log1p(others)


def _softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def _commit(rule, choices, block_step, num_open):
    """Positions to commit, from the open ones."""
    name, value = rule
    order = sorted(choices, key=lambda g: (-choices[g]["log"], g))
    if name == "quota":
        quota = num_open // value + (1 if block_step < num_open % value else 0)
        return order[: max(quota, 1)]
    if name == "threshold":
        return order[:1] + [g for g in order[1:] if choices[g]["log"] >= _log(value)]
    if name == "factor":
        n = 1
        while n < len(order) and (n + 2) * -math.expm1(choices[order[n]]["log"]) <= value:
            n += 1
        return order[:n]
    if name == "entropy":
        order = sorted(choices, key=lambda g: (choices[g]["entropy"], g))
        return order[:1] + [g for g in order[1:] if choices[g]["entropy"] <= value]
    if name == "local_leap":
        bar, relaxed, radius = _log(value[0]), _log(value[1]), value[2]
        anchors = [g for g in choices if choices[g]["log"] >= bar]
        near = {g for g in choices if any(abs(g - a) <= radius for a in anchors)}
        passes = [g for g in near if choices[g]["log"] >= relaxed]
        return sorted({*anchors, *passes}) or order[:1]
    if name == "hierarchical":
        bar, low = map(_log, value)
        sure = {g: choices[g]["log"] for g in choices}
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
        bar, max_kl, history = _log(value[0]), *value[1:]
        stable = lambda kls: len(kls) >= history and all(kl < max_kl for kl in kls[-history:])
        passes = [g for g in choices if choices[g]["log"] > bar and stable(choices[g]["kls"])]
        return passes or order[:1]
    if name == "entropy_budget":
        order = sorted(choices, key=lambda g: (choices[g]["entropy"], g))
        n = 1
        while n < len(order) and sum(choices[g]["entropy"] for g in order[:n]) <= value:
            n += 1
        return order[:n]
    if name == "wide_in":
        limit = min(max(int(len(order) * 0.7), 5), 20)
        return [g for g in order if choices[g]["log"] > _log(value)][:limit] or order[:1]
    time = np.linspace(1, 1e-3, value + 1)
    share = 1 if block_step >= value - 1 else 1 - time[block_step + 1] / time[block_step]
    if name == "origin":
        draw = lambda g: _uniform(_key(*choices[g]["stream"]), Stream.ORIGIN)
        return [g for g in order if draw(g) < share]
    assert name == "dream"
    return order[: max(int(len(order) * share), 1)]


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


def _uniform(key, stream):
    bits, _ = threefry2x32(key[0], key[1], jnp.uint32(stream), jnp.uint32(0))
    return (float(bits >> 9) + 0.5) * 2.0**-23


def look(model, prompt, completion):
    """The best token of every completion position and its probability, seeing everything."""
    hidden, _ = model.run([*prompt, *completion], range(len(prompt) + len(completion)))
    z = model.logits(hidden[len(prompt) :])
    z[:, model.cfg.mask_token_id] = -np.inf
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p.argmax(-1), p.max(-1)
