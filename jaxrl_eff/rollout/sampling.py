"""Drawing of the next token, and its log-probability."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxrl_eff.models.logits import Warp, warp
from jaxrl_eff.types import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for drawing responses.

    Attributes:
        max_tokens: maximum response length; longer responses are cut.
        temperature, top_k, top_p, min_p: see `models.Warp`; temperature 0 is greedy choice.
        samples: responses per prompt (R).
        stop: token ids that end a response, in addition to the model's own `eos`.
        pad: token id written after the end.
        compactions: number of times that, once at most half of the rows are unfinished, these are
            gathered into a batch of half the size. Bounds the work for finished rows; never changes
            a token.
        growths: number of sizes of the cache, which starts with room for max_tokens / growths
            tokens and grows growths - 1 times. Every token reads the whole cache, so this saves up
            to half of the reading, but the loop is compiled `growths` times; never changes a token.
        unstack: True to unstack the parameters of the layers before decoding. Faster, but it copies
            them once and compile time grows with depth. None: below 256 MiB on a CPU, 16 GiB
            elsewhere. A quantized base is never unstacked.

    Example:
        >>> from jaxrl_eff import Sampling
        >>> sampling = Sampling(max_tokens=256, temperature=0.7, top_p=0.9, samples=8)
        >>> sampling.warp.temperature, sampling.warp.truncates
        (0.7, True)
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    samples: int = 1
    stop: tuple[int, ...] = ()
    pad: int = 0
    compactions: int = 0
    growths: int = 1
    unstack: bool | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.samples < 1 or self.growths < 1 or self.compactions < 0:
            raise ValueError(
                f"{self}: needs max_tokens, samples and growths >= 1 and compactions >= 0."
            )
        _ = self.warp  # rejects invalid values now, not when tracing

    @property
    def warp(self) -> Warp:
        """The distribution to sample from; the trainer must use the same."""
        return Warp(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )


def draw(
    logits: Float[Array, "B V"], warp_: Warp, uniform: Float[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws one token per row; returns it and its log-probability in nats under the warped logits.

    The token is the inverse of the distribution function at `uniform`, in [0, 1): one random number
    per row, while Gumbel noise needs one per vocabulary entry. At temperature 0 it is the likeliest
    token and `uniform` is not used.
    """
    logits = warp(logits, warp_)
    top = logits.max(axis=-1, keepdims=True)
    weight = jnp.exp(logits - top)
    total = weight.sum(axis=-1)
    if warp_.temperature > 0:
        token = _invert(weight, uniform)
    else:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    return token, (chosen - top)[:, 0] - jnp.log(total)


def _invert(weight: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """Returns the first index at which the running sum of weight exceeds uniform * sum(weight).

    Two levels of about sqrt(V), so that each running sum is a small triangular product.
    """
    rows, vocab = weight.shape
    size = math.isqrt(vocab - 1) + 1
    blocks = -(-vocab // size)
    weight = jnp.pad(weight, ((0, 0), (0, blocks * size - vocab))).reshape(rows, blocks, size)
    mass = weight.sum(axis=-1)
    block, before = _first_above(mass, uniform * mass.sum(axis=-1))
    inside = jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0]
    index, _ = _first_above(inside, before)
    return block * size + index


def _first_above(
    weight: Float[Array, "B n"], target: Float[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Returns the first entry whose running sum exceeds target, and target minus the sum before it.

    Never an entry of weight 0; if rounding leaves target above every sum, the last nonzero entry.
    """
    n = weight.shape[1]
    running = jnp.einsum(
        "bi,ij->bj", weight, jnp.triu(jnp.ones((n, n), weight.dtype)), precision="highest"
    )
    at = jnp.arange(n, dtype=jnp.int32)[None, :]
    positive = weight > 0
    last = jnp.where(positive, at, 0).max(axis=1)
    first = jnp.where(positive & (running > target[:, None]), at, n).min(axis=1)
    index = jnp.minimum(first, last)
    before = jnp.where(at < index[:, None], weight, 0.0).sum(axis=1)
    return index, target - before


def uniforms(key: Key[Array, ""], row: Int[Array, "B"], steps: int) -> Float[Array, "B T"]:
    """Returns the random numbers of all steps for the given rows of the batch, in [0, 1).

    Each has its own key, derived from the row and then the step, so a row's draws are independent
    of the other rows, the number of steps and the sharding of the batch.
    """

    def one(row: Array, step: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), step))

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(row, jnp.arange(steps))


def ends(token: Int[Array, "B"], stops: tuple[int, ...]) -> Bool[Array, "B"]:
    """Returns True for tokens that are in `stops`."""
    done = jnp.zeros(token.shape, bool)
    for stop in stops:
        done |= token == stop
    return done
