"""Every train call's loss: against loops over sequences, and unmoved by how the rows are laid out.

The model is a table of logits by the token before, so that what a token gets depends on its own
sequence only; whatever changes between layouts then comes from the loss.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.algorithms import dpo, grpo, policy, ppo, reward_model, rloo, sft
from jaxrl_eff.core import meters

V, EOS, MAX_TOKENS = 7, 6, 5


def table_lm(params, tokens, position, segment):
    """log-probabilities and entropies of a bigram table, 0 where a segment begins."""
    logits = jax.nn.log_softmax(params["w"][jnp.roll(tokens, 1, axis=1)], axis=-1)
    there = (position > 0) & (segment > 0)
    logp = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(there, logp, 0.0), jnp.where(there, -(jnp.exp(logits) * logits).sum(-1), 0.0)


def table_values(params, tokens, position, segment):
    here = params["w"][jnp.roll(tokens, 1, axis=1), 0]
    return jnp.where((position > 0) & (segment > 0), here, 0.0)


def table_scores(params, tokens, position, segment):
    del position
    return jnp.where(segment > 0, params["w"][tokens, 1], 0.0)


def sequences(lengths=((2, 3), (1, 5), (3, 1), (2, 4)), seed=0):
    """Dicts of `[t]` arrays: a prompt and a response each, with what calls before would write."""
    rng = np.random.default_rng(seed)
    out = []
    for i, (prompt, answer) in enumerate(lengths):
        n = prompt + answer
        mask = (np.arange(n) >= prompt).astype(np.float32)
        tokens = rng.integers(0, V - 1, n)
        if i % 2 == 0:
            tokens[-1] = EOS
        normal = lambda scale=0.4: rng.normal(size=n) * scale * mask  # noqa: B023, E731
        logp = normal() - 2 * mask
        out.append(
            {
                "tokens": tokens,
                "mask": mask,
                "logp": logp,
                "ref_logp": logp + normal(),
                "adv": normal(2.0) if seed % 2 else np.full(n, rng.normal()) * mask,
                "value": normal(),
                "ret": normal(),
            }
        )
    return out


def rows_of(seqs, layout, length, dtype=np.float32):
    """Packs sequences: `layout` lists the sequences of each row."""
    ints = ("tokens", "segment", "position")
    batch = {k: np.zeros((len(layout), length), np.int32) for k in ints}
    batch |= {k: np.zeros((len(layout), length), dtype) for k in seqs[0] if k != "tokens"}
    for b, row in enumerate(layout):
        at = 0
        for s, i in enumerate(row):
            n = len(seqs[i]["tokens"])
            whole = seqs[i] | {"segment": np.full(n, s + 1), "position": np.arange(n)}
            for k, x in whole.items():
                batch[k][b, at : at + n] = x
            at += n
    return {k: jnp.asarray(x) for k, x in batch.items()}


PARAMS = {"w": jnp.asarray(np.random.default_rng(5).normal(size=(V, V)), jnp.float32)}


def outcome(loss, seqs, microbatches, length, params=PARAMS):
    """Mean loss, its gradient and the meters of rows that come in several microbatches.

    `length` is of all rows, or of the rows of each microbatch.
    """
    keep = lambda b: {k: v for k, v in b.items() if k in loss.reads}  # noqa: E731
    sizes = [length] * len(microbatches) if isinstance(length, int) else length
    parts = zip(microbatches, sizes, strict=True)
    batches = [keep(rows_of(seqs, *part, params["w"].dtype)) for part in parts]
    (total, (weight, seen)), grads = loss.step(params, batches[0])
    for batch in batches[1:]:
        (t, (w, m)), g = loss.step(params, batch)
        total, weight = total + t, weight + w
        seen = {k: meters.add(seen[k], m[k]) for k in m}
        grads = jax.tree.map(jnp.add, grads, g)
    return total / weight, grads["w"] / weight, {k: meters.read(v) for k, v in seen.items()}


class Loss:
    def __init__(self, forward, loss, reads=""):
        self.forward, self.loss = forward, loss
        self.reads = {"tokens", "segment", "position", "mask", *reads.split()}
        self.step = jax.jit(jax.value_and_grad(self._total, has_aux=True))

    def _total(self, params, batch):
        row = (batch[k] for k in ("tokens", "position", "segment"))
        total, weight, seen = self.loss(self.forward(params, *row), batch, jax.random.key(0))
        return total, (weight, seen)


def group_loss(reads="logp adv ref_logp", **fields):
    cfg = grpo.GRPOConfig(**fields)
    return Loss(table_lm, partial(grpo.policy_loss, cfg, (EOS,), MAX_TOKENS), reads)


def actor_loss(reads="logp adv", **fields):
    return Loss(table_lm, partial(ppo.policy_loss, ppo.PPOConfig(**fields)), reads)


def pair_loss(**fields):
    return Loss(table_lm, partial(dpo.preference_loss, dpo.DPOConfig(**fields)), "ref_logp")


def imitation(how):
    return Loss(table_lm, partial(sft.likelihood_loss, sft.SFTConfig(loss_agg=how)))


LOSSES = {
    "sft": imitation("token_mean"),
    "sft by sequence": imitation("sequence_mean"),
    "rm": Loss(
        table_scores, partial(reward_model.pair_loss, reward_model.RewardModelConfig(center=0.1))
    ),
    "dpo": pair_loss(label_smoothing=0.1),
    "ipo": pair_loss(loss="ipo", length_normalised=True),
    "hinge": pair_loss(loss="hinge", beta=0.5),
    "ppo": actor_loss(entropy=0.1),
    "ppo kl in loss": actor_loss("logp adv ref_logp", kl_in="loss", dual_clip=1.5),
    "critic": Loss(table_values, partial(ppo.value_loss, ppo.PPOConfig()), "value ret"),
    "grpo": group_loss(),
    "dapo": group_loss("logp adv", loss_agg="token_mean", clip_high=0.28, mask_truncated=True),
    "dr grpo": group_loss(loss_agg="constant", kl_estimator="k1"),
    "gspo": group_loss("logp adv", ratio="sequence", clip_low=0.1, clip_high=0.1, entropy=0.1),
    "reinforce": Loss(
        table_lm, partial(policy.reinforce_loss, 0.2, "sequence_sum", MAX_TOKENS), "logp adv"
    ),
}

PLAIN = ([[[0], [1], [2], [3]]], 6)
PAIRED = ([[[0, 1], [2, 3]]], 11)
LAYOUTS = {
    "packed and padded": ([[[0, 1], [2, 3], []]], 17),
    "microbatches": ([[[2, 3]], [[0, 1]]], 22),
    "one row": ([[[2, 3, 0, 1]]], 22),
}


@pytest.mark.parametrize("name", LOSSES)
def test_layout_never_changes_a_loss_its_gradient_or_its_meters(name):
    loss, seqs = LOSSES[name], sequences()
    pairs = name in ("rm", "dpo", "ipo", "hinge")
    value, grad, seen = outcome(loss, seqs, *(PAIRED if pairs else PLAIN))
    assert jnp.isfinite(value) and jnp.abs(grad).max() > 1e-3
    for layout in LAYOUTS.values():
        other, other_grad, other_seen = outcome(loss, seqs, *layout)
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other_grad, grad, rtol=1e-5, atol=1e-6)
        assert other_seen.keys() == seen.keys()
        for k in seen:
            np.testing.assert_allclose(other_seen[k], seen[k], rtol=1e-5, atol=1e-6, err_msg=k)


def scheduled(units, seed):
    """Any schedule: the units' rows of several micro-steps, some rows short and some long."""
    rng = np.random.default_rng(seed)
    steps = [[[] for _ in range(rng.integers(1, 4))] for _ in range(rng.integers(1, 4))]
    for unit in rng.permutation(len(units)):
        rows = steps[rng.integers(len(steps))]
        rows[rng.integers(len(rows))] += units[unit]
    steps = [rows for rows in steps if any(rows)]
    return steps, [22 + int(rng.integers(9)) for _ in steps]


@pytest.mark.parametrize("name", LOSSES)
def test_no_schedule_changes_a_loss_in_double_precision(name):
    pairs = name in ("rm", "dpo", "ipo", "hinge")
    units = [[0, 1], [2, 3]] if pairs else [[0], [1], [2], [3]]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = {"w": jnp.asarray(np.random.default_rng(5).normal(size=(V, V)))}
        plain = ([[list(u) for u in units]], 22)
        value, grad, _ = outcome(LOSSES[name], sequences(), *plain, params)
        assert grad.dtype == jnp.float64
        other, other_grad, _ = outcome(LOSSES[name], sequences(), *scheduled(units, 1), params)
        np.testing.assert_allclose(other, value, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(other_grad, grad, rtol=1e-10, atol=1e-10)


# Loops over sequences, in float64


def new_logp(seq):
    w = np.asarray(PARAMS["w"], np.float64)
    before = w[seq["tokens"][:-1]]
    logits = before - np.log(np.exp(before).sum(-1, keepdims=True))
    logp = np.concatenate([[0.0], logits[np.arange(len(before)), seq["tokens"][1:]]])
    entropy = np.concatenate([[0.0], -(np.exp(logits) * logits).sum(-1)])
    return logp, entropy


def surrogate(ratio, adv, low, high):
    return -min(ratio * adv, min(max(ratio, 1 - low), 1 + high) * adv)


def test_ppo_policy_loss_equals_the_loop():
    seqs, losses_ = sequences(seed=1), []
    for seq in seqs:
        new, entropy = new_logp(seq)
        for t in np.flatnonzero(seq["mask"]):
            ratio = np.exp(new[t] - seq["logp"][t])
            losses_.append(surrogate(ratio, seq["adv"][t], 0.2, 0.2) - 0.1 * entropy[t])
    value, _, seen = outcome(LOSSES["ppo"], seqs, *PLAIN)
    np.testing.assert_allclose(value, np.mean(losses_), rtol=1e-5)
    gaps = [abs(new_logp(s)[0] - s["logp"])[s["mask"] > 0] for s in seqs]
    gaps = np.concatenate(gaps)
    np.testing.assert_allclose(seen["logp_gap"], gaps.mean(), rtol=1e-5)
    np.testing.assert_allclose(seen["logp_gap_max"], gaps.max(), rtol=1e-5)
    assert gaps.max() * 1.2 > seen["logp_gap_p95"] >= np.quantile(gaps, 0.9)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss_agg": "token_mean", "clip_high": 0.28},
        {"loss_agg": "constant"},
        {"mask_truncated": True, "kl_estimator": "k2"},
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    ],
    ids=["grpo", "dapo", "dr grpo", "truncated", "gspo"],
)
def test_grpo_policy_loss_equals_the_loop(fields):
    cfg, seqs = grpo.GRPOConfig(**fields), sequences()
    per_sequence, tokens = [], 0
    for seq in seqs:
        if cfg.mask_truncated and seq["tokens"][-1] != EOS:
            continue
        new, _ = new_logp(seq)
        chosen = np.flatnonzero(seq["mask"])
        gap = (new - seq["logp"])[chosen]
        if cfg.ratio == "sequence":
            gap = np.full_like(gap, gap.mean())
        terms = []
        for t, g in zip(chosen, gap, strict=True):
            d = new[t] - seq["ref_logp"][t]
            kl = np.exp(-d) - 1 + d if cfg.kl_estimator == "k3" else d**2 / 2
            term = surrogate(np.exp(g), seq["adv"][t], cfg.clip_low, cfg.clip_high)
            terms.append(term + cfg.beta * kl)
        per_sequence.append(np.array(terms))
        tokens += len(chosen)
    expected = {
        "sequence_mean": np.mean([x.mean() for x in per_sequence]),
        "token_mean": sum(x.sum() for x in per_sequence) / tokens,
        "constant": np.mean([x.sum() / MAX_TOKENS for x in per_sequence]),
    }[cfg.loss_agg]
    value, _, _ = outcome(group_loss(**fields), seqs, *PLAIN)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
def test_dpo_equals_the_loop(normalized):
    seqs, terms, margins = sequences(), [], []
    ratio = [
        (new_logp(s)[0] - s["ref_logp"])[s["mask"] > 0].sum()
        / (s["mask"].sum() if normalized else 1)
        for s in seqs
    ]
    for chosen, rejected in ((0, 1), (2, 3)):
        z = 0.3 * (ratio[chosen] - ratio[rejected])
        terms.append(np.log1p(np.exp(-z)))
        margins.append(z)
    value, _, seen = outcome(pair_loss(beta=0.3, length_normalised=normalized), seqs, *PAIRED)
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(seen["margin"], np.mean(margins), rtol=1e-5)
    np.testing.assert_allclose(seen["accuracy"], np.mean(np.array(margins) > 0))
    np.testing.assert_allclose(
        seen["chosen_reward"] - seen["rejected_reward"], seen["margin"], rtol=1e-5, atol=1e-6
    )


def test_reward_model_equals_the_loop():
    seqs = sequences()
    score = [float(PARAMS["w"][s["tokens"][-1], 1]) for s in seqs]
    terms = [
        np.log1p(np.exp(score[b] - score[a])) + 0.1 * (score[a] + score[b]) ** 2
        for a, b in ((0, 1), (2, 3))
    ]
    value, _, seen = outcome(LOSSES["rm"], seqs, *PAIRED)
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(seen["score"], np.mean(score), rtol=1e-5)


def test_critic_loss_equals_the_loop():
    terms = []
    for s in sequences():
        for t in np.flatnonzero(s["mask"]):
            v, old, ret = float(PARAMS["w"][s["tokens"][t - 1], 0]), s["value"][t], s["ret"][t]
            near = old + min(max(v - old, -0.2), 0.2)
            terms.append(max((v - ret) ** 2, (near - ret) ** 2) / 2)
    value, _, _ = outcome(LOSSES["critic"], sequences(), *PLAIN)
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-5)


# Relations


def on_policy(seqs):
    return [s | {"logp": new_logp(s)[0] * s["mask"]} for s in seqs]


def test_gspo_of_single_token_answers_is_ppo():
    seqs = sequences(((2, 1), (1, 1), (3, 1), (2, 1)))
    fields = {"beta": 0.0, "clip_low": 0.2, "clip_high": 0.2}
    gspo = outcome(group_loss("logp adv", ratio="sequence", **fields), seqs, *PLAIN)
    plain = outcome(actor_loss(), seqs, *PLAIN)
    np.testing.assert_allclose(gspo[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(gspo[1], plain[1], rtol=1e-5, atol=1e-6)


def test_on_policy_clipping_and_gspo_change_no_gradient():
    seqs = on_policy(sequences())
    fields = {"loss_agg": "sequence_mean", "beta": 0.0}
    token = outcome(group_loss("logp adv", **fields), seqs, *PLAIN)
    sequence = outcome(group_loss("logp adv", ratio="sequence", **fields), seqs, *PLAIN)
    free = Loss(table_lm, partial(policy.reinforce_loss, None, "sequence_mean", 1), "logp adv")
    for other in (sequence, outcome(free, seqs, *PLAIN)):
        np.testing.assert_allclose(other[1], token[1], rtol=1e-5, atol=1e-6)
    assert token[2]["clip_fraction"] == 0
    np.testing.assert_allclose(token[2]["ratio_max"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(token[2]["logp_gap_max"], 0.0, atol=1e-6)


def test_reinforce_has_the_gradient_of_the_weighted_log_likelihood():
    seqs = on_policy(sequences())

    def weighted(params):
        batch = rows_of(seqs, *(PLAIN[0][0], PLAIN[1]))
        logp, _ = table_lm(params, batch["tokens"], batch["position"], batch["segment"])
        return -(batch["adv"] * logp * batch["mask"]).sum() / len(seqs)

    _, grad, _ = outcome(LOSSES["reinforce"], seqs, *PLAIN)
    np.testing.assert_allclose(grad, jax.grad(weighted)(PARAMS)["w"], rtol=1e-5, atol=1e-6)


def test_dr_grpo_is_the_sequence_sum_over_max_tokens():
    base = {"beta": 0.0, "clip_low": 0.2, "clip_high": 0.2}
    constant = outcome(group_loss("logp adv", loss_agg="constant", **base), sequences(), *PLAIN)
    total = outcome(LOSSES["reinforce"], sequences(), *PLAIN)
    np.testing.assert_allclose(constant[1] * MAX_TOKENS, total[1], rtol=1e-5, atol=1e-6)


def test_rloo_advantage_is_centred_grpo_with_the_kl_in_the_score():
    rng = np.random.default_rng(3)
    rows, length = 6, 4
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    batch = {
        "score": normal(rows),
        "group": jnp.asarray([0, 1, 0, 1, 0, 1], jnp.int32),
        "mask": jnp.asarray(rng.integers(0, 2, (rows, length)), jnp.float32),
        "logp": normal(rows, length),
        "ref_logp": normal(rows, length),
    }
    key = jax.random.key(0)
    out = rloo.advantage(rloo.RLOOConfig(kl_coef=0.5), batch, key)["adv"]
    kl = ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(axis=1)
    shaped = batch | {"score": batch["score"] - 0.5 * kl}
    centred = grpo.advantage(grpo.GRPOConfig(scale_by_std=False), shaped, key)["adv"]
    np.testing.assert_allclose(out, centred * 3 / 2, rtol=1e-5, atol=1e-6)
