"""PPO for language models: the six calls of ReaL's figure, plus the advantages.

    r_t = -beta KL_t + [t last] score                       advantages.shaped_reward
    A_t, R_t = GAE(r, V)                                     advantages.gae
    actor:   -min(rho_t A_t, clip(rho_t, 1 - e, 1 + e) A_t)   rho_t = pi(t) / pi_sampler(t)
    critic:  max((V - R)^2, (clip(V) - R)^2) / 2

Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155. The KL penalty is part
of the reward, or of the loss (`kl_in`). Its coefficient is fixed, or a model of one parameter that
a seventh call trains (Ziegler et al. 2019, arXiv:1909.08593, Sec. 2.2).

Not supported: shared weights of actor and critic, and mixing in pretraining data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff import masked
from jaxrl_eff.algorithms import advantages, losses
from jaxrl_eff.algorithms.base import Algorithm, Own, Rollout, require, require_one_of
from jaxrl_eff.algorithms.policy import (
    PROMPTS,
    ends,
    policy_meters,
    reference_call,
    reward_call,
    reward_of,
    rollout_call,
    rollout_meters,
)
from jaxrl_eff.core import Graph, Spec, infer, local, meters, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import token_logprobs, token_values, values
from jaxrl_eff.types import Array, Float, PyTree


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO.

    Attributes:
        clip: the ratio is clipped to 1 +- clip.
        dual_clip: c > 1 bounds the loss of tokens with A < 0 (arXiv:1912.09729); None: no bound.
        value_clip: maximum change of a value from its old value; None: no limit.
        discount, lam: gamma and lambda of GAE.
        whiten_advantages: shift and scale a batch's advantages to mean 0, variance 1.
        whiten_rewards: scale the shaped rewards to variance 1, keeping their mean.
        entropy: coefficient of the entropy bonus; 0 skips its computation.
        kl_coef: beta; the initial value if adaptive. 0 drops the reference.
        kl_in: "reward" or "loss".
        kl_estimator: "k1", "k2" or "k3".
        kl_target: nats per response targeted by an adaptive beta; None keeps beta fixed.
        kl_gain: K, the adaptation rate of beta.
        missing_eos_penalty: subtracted from the score of a response without an end token.
        epochs, minibatches: passes over a rollout, updates per pass.
    """

    clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    discount: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    entropy: float = 0.0
    kl_coef: float = 0.05
    kl_in: str = "reward"
    kl_estimator: str = "k1"
    kl_target: float | None = None
    kl_gain: float = 0.1
    missing_eos_penalty: float = 0.0
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self):
        require(self, "clip", 0 < self.clip < 1, "between 0 and 1")
        require(self, "dual_clip", self.dual_clip is None or self.dual_clip > 1, "None or above 1")
        ok = self.value_clip is None or self.value_clip > 0
        require(self, "value_clip", ok, "None or above 0")
        require(self, "discount", 0 < self.discount <= 1, "in (0, 1]")
        require(self, "lam", 0 <= self.lam <= 1, "in [0, 1]")
        require(self, "entropy", self.entropy >= 0, "at least 0")
        require(self, "kl_coef", self.kl_coef >= 0, "at least 0")
        require_one_of(self, "kl_in", ("reward", "loss"))
        require_one_of(self, "kl_estimator", losses.ESTIMATORS)
        require(self, "kl_target", self.kl_target is None or self.kl_target > 0, "None or above 0")
        grows = self.kl_target is None or self.kl_coef > 0
        require(self, "kl_coef", grows, "above 0 with kl_target, which multiplies it")
        require(self, "kl_gain", 0 < self.kl_gain < 5, "between 0 and 5, so that beta stays > 0")
        require(self, "missing_eos_penalty", self.missing_eos_penalty >= 0, "at least 0")
        require(self, "epochs", self.epochs >= 1, "at least 1")
        require(self, "minibatches", self.minibatches >= 1, "at least 1")

    @property
    def adaptive(self) -> bool:
        return self.kl_target is not None


def graph(cfg: PPOConfig, models: Mapping[str, LMConfig], rollout: Rollout) -> Graph:
    """Returns PPO's calls.

    Models: actor, ref (unless kl_coef is 0), critic, reward (if it is a model), kl (if adaptive).

    Raises:
        ValueError: the critic or reward model has no value head, or there is a penalty for a
            missing end token but no token ends a response.
    """
    (sampling, _), actor, critic = rollout, models["actor"], models["critic"]
    if critic.head != "value":
        raise ValueError(f"the critic's head is {critic.head!r}; it must be 'value'.")
    stop = ends(actor, sampling)
    if cfg.missing_eos_penalty and not stop:
        raise ValueError(
            f"missing_eos_penalty is {cfg.missing_eos_penalty}, but neither the model's eos nor "
            "sampling.stop names a token that ends a response."
        )
    row = "tokens segment position"
    logprob = partial(token_logprobs, actor, warp=sampling.warp, with_entropy=cfg.entropy > 0)
    # Arrays that exist only with a reference, an adaptive beta, or the penalty in the loss.
    ref_logp = " ref_logp" * (cfg.kl_coef > 0)
    beta, error = " kl_coef" * cfg.adaptive, " kl_error" * cfg.adaptive
    in_loss = (ref_logp + beta) * (cfg.kl_in == "loss")
    repeat = {"epochs": cfg.epochs, "minibatches": cfg.minibatches}
    calls = (
        rollout_call(actor, sampling),
        reward_call(reward_of(models, rollout)),
        ref_logp and reference_call(actor, sampling),
        infer("critic_inf",   of="critic", fn=values(critic),
                              reads=row,   writes="value"),
        beta and
        infer("kl_inf",       of="kl",     fn=coefficient,
                              reads="score", writes="kl_coef"),
        local("advantage",                 fn=partial(advantage, cfg, stop),
                              reads="tokens segment mask logp score value" + ref_logp + beta,
                              writes="adv ret" + error),
        train("actor_train",  of="actor",  forward=logprob, loss=partial(policy_loss, cfg),
                              reads=row + " mask logp adv" + in_loss, **repeat),
        train("critic_train", of="critic", forward=partial(token_values, critic),
                              loss=partial(value_loss, cfg),
                              reads=row + " mask value ret", **repeat),
        beta and
        train("kl_train",     of="kl",     loss=partial(coefficient_loss, cfg),
                              reads="kl_error"),
    )  # fmt: skip
    return Graph(inputs=PROMPTS, calls=tuple(c for c in calls if c))


def advantage(
    cfg: PPOConfig, stop: tuple[int, ...], batch: dict[str, Array], key: Array
) -> dict[str, Any]:
    """Shapes the reward and estimates advantages. Each row must be one sequence.

    Returns:
        `adv`, `ret`; with an adaptive beta also `kl_error`, clip(KL / target - 1, -0.2, 0.2) of
        the whole batch, repeated for every row; and meters: those of `policy.rollout_meters`,
        `ended` (fraction of responses with an end token) and `beta`, in reward per nat.
    """
    del key
    mask, segment, score = batch["mask"], batch["segment"], batch["score"]
    rows = jnp.float32(score.shape[0])
    seen = rollout_meters(batch)
    if stop:
        done = advantages.ended(batch["tokens"], mask, segment, ends=stop).max(axis=1)
        score = score - cfg.missing_eos_penalty * (1 - done)
        seen["ended"] = meters.Mean(done.sum(), rows)
    beta = batch.get("kl_coef", jnp.full_like(score, cfg.kl_coef))
    penalty, in_reward = jnp.zeros_like(mask), cfg.kl_in == "reward"
    if "ref_logp" in batch:
        seen["beta"] = meters.Mean(beta.sum(), rows)
        if in_reward:
            penalty = losses.kl(batch["logp"], batch["ref_logp"], mask, cfg.kl_estimator)
    reward = advantages.shaped_reward(score, penalty, mask, segment, kl_coef=beta)
    if cfg.whiten_rewards:
        reward = masked.whiten(reward, mask, shift_mean=False)
    adv, ret = advantages.gae(
        reward, batch["value"], mask, segment, discount=cfg.discount, lam=cfg.lam
    )
    if cfg.whiten_advantages:
        adv = masked.whiten(adv, mask)
    out = {"adv": adv, "ret": ret, "metrics": seen}
    if cfg.adaptive:
        error = jnp.clip(seen["ref_kl"].read() / cfg.kl_target - 1, -0.2, 0.2)
        out["kl_error"] = jnp.broadcast_to(error, score.shape)
    return out


def policy_loss(
    cfg: PPOConfig, numbers: tuple[Array, Array], batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes the clipped surrogate over tokens: sum, tokens, `policy.policy_meters`.

    Args:
        numbers: log-probabilities and entropies, `[B, T]` each.
    """
    del key
    (logp, entropy), old, mask = numbers, batch["logp"], batch["mask"]
    ratio = losses.token_ratio(logp, old, mask)
    clip = {"clip_low": cfg.clip, "clip_high": cfg.clip}
    loss = losses.clipped_surrogate(ratio, batch["adv"], **clip, dual_clip=cfg.dual_clip)
    if cfg.entropy:
        loss = loss - cfg.entropy * entropy
    if "ref_logp" in batch:
        beta = batch.get("kl_coef", jnp.full_like(mask, cfg.kl_coef))
        beta = beta if beta.ndim == 2 else beta[:, None]  # per token in packed rows
        loss = loss + beta * losses.kl_penalty(logp, batch["ref_logp"], mask, cfg.kl_estimator)
    total, weight = losses.aggregate(loss, mask, batch["segment"], "token_mean")
    return (
        total,
        weight,
        policy_meters(
            logp=logp,
            old=old,
            mask=mask,
            ratio=ratio,
            clipped=losses.clipped(ratio, batch["adv"], **clip),
            entropy=entropy if cfg.entropy else None,
        ),
    )


def value_loss(
    cfg: PPOConfig, value: Float[Array, "B T"], batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes the critic's clipped squared error over tokens: sum, tokens, meters.

    Meters: `error` ((v - R)^2), `value`, `ret` (their means) and `clip_fraction`, the fraction of
    values that moved further than `value_clip`.
    """
    del key
    old, ret, mask = batch["value"], batch["ret"], batch["mask"]
    loss = losses.value_loss(value, old, ret, clip=cfg.value_clip)
    total, weight = losses.aggregate(loss, mask, batch["segment"], "token_mean")
    moved = jnp.abs(value - old) > (jnp.inf if cfg.value_clip is None else cfg.value_clip)
    return (
        total,
        weight,
        {
            "error": meters.Mean((jnp.square(value - ret) * mask).sum(), weight),
            "value": meters.Mean((value * mask).sum(), weight),
            "ret": meters.Mean((ret * mask).sum(), weight),
            "clip_fraction": meters.Mean((moved.astype(jnp.float32) * mask).sum(), weight),
        },
    )


# The adaptive coefficient is a model of one number: {"beta": float32}.


def kl_params(cfg: PPOConfig) -> dict[str, Array]:
    """Returns the initial parameters of the model "kl"."""
    return {"beta": jnp.float32(cfg.kl_coef)}


def kl_spec() -> Spec:
    """Returns the `Spec` of the model "kl".

    Plain gradient descent with rate 1 makes `coefficient_loss` the paper's update.
    """
    return Spec({"beta": jax.ShapeDtypeStruct((), jnp.float32)}, {"beta": ()}, optax.sgd(1.0))


def coefficient(params: PyTree, batch: dict[str, Array], key: Array) -> dict[str, Array]:
    """Returns the coefficient beta for every row."""
    del key
    return {"kl_coef": jnp.broadcast_to(params["beta"], batch["score"].shape)}


def coefficient_loss(
    cfg: PPOConfig, params: PyTree, batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes a loss whose gradient step is beta <- beta (1 + K e).

    e = clip(KL / target - 1, -0.2, 0.2). Ziegler et al. 2019, arXiv:1909.08593, Sec. 2.2. Every row
    has the batch's e, so rows can be summed and split like any others.
    """
    del key
    beta, error = params["beta"], batch["kl_error"]
    step = jax.lax.stop_gradient(beta * cfg.kl_gain * error)
    rows = jnp.float32(error.shape[0])
    return -(step * beta).sum(), rows, {"error": meters.Mean(error.sum(), rows)}


ALGORITHM = Algorithm(
    config=PPOConfig,
    graph=graph,
    batch="prompts",
    roles={"actor": "lm", "ref": "lm", "critic": "value", "reward": "value"},
    own={"kl": Own(kl_spec(), kl_params)},
)
