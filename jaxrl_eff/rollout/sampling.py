"""How the next token is drawn, and what its log-probability was."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_eff.models.logits import Warp, log_softmax_at, warp
from jaxrl_eff.shapes import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_tokens: the longest response; a longer one is cut there.
        temperature, top_k, top_p, min_p: see `models.Warp`; temperature 0 is greedy choice.
        samples: responses per prompt (R).
        stop: token ids that end a response, besides the model's own `eos`.
        pad: token id written behind the end.
        compactions: how often, once at most half of the rows are unfinished, these are gathered
            into a batch of half the size. Bounds the work for rows that finished; never changes
            a token.
        unstack: take the parameters of the layers apart before decoding. Faster, but it copies
            them once and compile time grows with depth. None: if they are below 256 MiB.
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
    unstack: bool | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.samples < 1 or self.compactions < 0:
            raise ValueError(
                f"{self}: needs max_tokens >= 1, samples >= 1 and compactions >= 0."
            )
        _ = self.warp  # refuses impossible values now, not when tracing

    @property
    def warp(self) -> Warp:
        """The distribution that is sampled from; the trainer must use the same."""
        return Warp(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )


def draw(
    logits: Float[Array, "B V"], warp_: Warp, keys: Key[Array, "B"], step: Int[Array, ""]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row and its log-probability in nats under the warped distribution.

    Every row has its own key, so that what it draws depends on neither the other rows nor on how
    the batch is sharded. argmax(logits + Gumbel noise) is a sample of the softmax.
    """
    logits = warp(logits, warp_)
    noisy = logits
    if warp_.temperature > 0:
        vocab = logits.shape[-1]
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), (vocab,)))
        noisy = logits + noise(keys)
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return token, log_softmax_at(logits, token)


def ends(token: Int[Array, "B"], stops: tuple[int, ...]) -> Bool[Array, "B"]:
    """Whether the token is one of `stops`."""
    done = jnp.zeros(token.shape, bool)
    for stop in stops:
        done |= token == stop
    return done
