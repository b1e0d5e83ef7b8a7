"""Codecs that store Adam's moments and the weights, in one table for each.

Arithmetic is float32 in registers and costs no memory traffic; the cost is in what is read and
written. So an optimizer's precision is a choice of codecs, and the bytes per parameter add up:

    moments  float32 4, bf16 2, bf16_sr 2, bf16x2 4, int8 1 + 2/group
    weights  (in addition to 2 of the visible ones)  bf16x2 2, int16 2, int8 1, sr 0, none 0

A codec turns one float32 array into one or more stored arrays ("parts") and back. Parts have the
shape of the parameter, or for the scales of groups its shape with the last axis divided, so that
the parameter's sharding applies to them too.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrl_eff.optim import mcf

Array = jax.Array
Parts = dict[str, Array]
GROUP = 32


@dataclasses.dataclass(frozen=True)
class MomentCodec:
    """A way to store a moment.

    Attributes:
        parts: names of the stored arrays.
        encode: (float32 x, noise or None) -> parts.
        decode: parts -> float32.
        noisy: True if `encode` needs uniform uint32 noise of x's shape.
    """

    parts: tuple[str, ...]
    encode: Callable[[Array, Array | None], Parts]
    decode: Callable[[Parts], Array]
    noisy: bool = False


def _plain(dtype) -> MomentCodec:
    return MomentCodec(
        ("value",),
        lambda x, _: {"value": mcf.store(x, dtype)},
        lambda parts: mcf.load(parts["value"]),
    )


def _bf16x2() -> MomentCodec:
    def encode(x: Array, _) -> Parts:
        hi, lo = mcf.split(x)
        return {"value": hi, "low": lo}

    return MomentCodec(("value", "low"), encode, lambda p: mcf.join(p["value"], p["low"]))


def _stochastic() -> MomentCodec:
    return MomentCodec(
        ("value",),
        lambda x, noise: {"value": mcf.stochastic(x, noise).astype(jnp.bfloat16)},
        lambda parts: mcf.load(parts["value"]),
        noisy=True,
    )


def _groups(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)


def _scales(x: Array) -> Array:
    """The largest magnitude of each group, rounded up to bfloat16 so that no code overflows."""
    top = jnp.max(jnp.abs(_groups(x)), axis=-1)
    rounded = mcf.round_to(top, jnp.bfloat16)
    return jnp.where(rounded < top, mcf.round_to(rounded * (1 + 2.0**-7), jnp.bfloat16), rounded)


def _spread(scale: Array, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(mcf.load(scale)[..., None], (*scale.shape, GROUP)).reshape(shape)


def _int8(signed: bool) -> MomentCodec:
    """8 bits per entry and a bfloat16 scale for every 32 along the last axis.

    A first moment is divided by its scale to t in [-1, 1] and stored as 2t / (1 + |t|), which gives
    small values finer steps. Of a second moment the root is stored, and a code is at least 1: a
    zero with a nonzero first moment would make the quotient explode. (The maps are FlashOptim's,
    arXiv:2602.23349.) Its codes are rounded stochastically: with b2 = 0.999 a step changes the root
    by less than a fifth of a code, so rounding to nearest would never change it.

    An entry thousands of times as large as the other 31 of its group hides them: their first
    moments are 0 and their second ones at least its 255th, so they do not move until it has decayed
    (with b2 = 0.999 to a tenth in 2,300 updates). Other groups are not affected.
    """

    def ratio(x: Array, scale: Array) -> Array:
        s = _spread(scale, x.shape)
        return jnp.where(s > 0, x / jnp.where(s > 0, s, 1.0), 0.0)

    def encode(x: Array, noise: Array | None) -> Parts:
        x = x if signed else jnp.sqrt(x)
        scale = _scales(x).astype(jnp.bfloat16)
        t = ratio(x, scale)
        if signed:
            code = jnp.round(127 * (2 * t / (1 + jnp.abs(t)))).astype(jnp.int8)
        else:
            # 24 bits, the significand of a float32
            dither = (noise >> 8).astype(jnp.float32) * 2.0**-24
            code = jnp.clip(jnp.floor(255 * t + dither), 1, 255).astype(jnp.uint8)
        return {"value": code, "scale": scale}

    def decode(parts: Parts) -> Array:
        code = mcf.load(parts["value"])
        s = _spread(parts["scale"], code.shape)
        if signed:
            c = code / 127
            return s * (c / (2 - jnp.abs(c)))
        return jnp.square(s * (code / 255))

    return MomentCodec(("value", "scale"), encode, decode, noisy=not signed)


MOMENTS: Mapping[str, MomentCodec] = {
    "float32": _plain(jnp.float32),
    "bf16": _plain(jnp.bfloat16),
    "bf16_sr": _stochastic(),
    "bf16x2": _bf16x2(),
}
_INT8 = {"mu": _int8(signed=True), "nu": _int8(signed=False)}
MOMENT_NAMES = (*MOMENTS, "int8")


def moment(name: str, which: str, shape: tuple[int, ...]) -> MomentCodec:
    """The codec of a moment ("mu" or "nu") of an array of this shape.

    "int8" is for matrices whose last axis divides into groups of 32; others get "bf16_sr".

    Raises:
        ValueError: an unknown name.
    """
    if name not in MOMENT_NAMES:
        raise ValueError(f"{which}: unknown codec {name!r}; expected one of {[*MOMENT_NAMES]}.")
    if name != "int8":
        return MOMENTS[name]
    fits = len(shape) >= 2 and shape[-1] % GROUP == 0 and shape[-1] > 0
    return _INT8[which] if fits else MOMENTS["bf16_sr"]


@dataclasses.dataclass(frozen=True)
class WeightCodec:
    """A way to store a weight with a 16-bit part that is visible to the model.

    Attributes:
        dtype: of the part that is kept in addition to the visible weight; None if there is none.
        dtypes: supported dtypes of the visible weights.
        join: (visible p, kept lo) -> float32 weight.
        step: (p, lo, float32 change, noise) -> (update, new lo): the update to pass to
            `optax.apply_updates`, and what is kept after it was applied.
        start: float32 weight -> (p's float32 value, lo).
        noisy: True if `step` needs uniform uint32 noise of p's shape.
    """

    dtype: jnp.dtype | None
    dtypes: tuple[str, ...]
    join: Callable[[Array, Array | None], Array]
    step: Callable[[Array, Array | None, Array, Array | None], tuple[Array, Array | None]]
    start: Callable[[Array, jnp.dtype], tuple[Array, Array | None]]
    noisy: bool = False


def applied(p: Array, update: Array) -> Array:
    """Result of `optax.apply_updates` on p, in float32: one addition, one rounding."""
    return mcf.round_to(mcf.load(p) + mcf.load(update), p.dtype)


def still(update: Array) -> Array:
    """An update with its zeros as -0.0: x + -0.0 is x bit for bit, also where x is -0.0."""
    return jnp.where(update == 0, -0.0, update)


def _pair() -> WeightCodec:
    """bfloat16 hi + bfloat16 lo: Collage's weights, and Kahan's sum.

        y = lo + change;  u = RN(y);  h = RN(p + u);  lo' = RN(y - (h - p))

    lo' is defined by what is applied, so no order of magnitudes is assumed, and p = 0 is no
    special case.
    """

    def step(p, lo, change, _):
        wide = mcf.load(p)
        y = mcf.load(lo) + change
        u = still(mcf.round_to(y, p.dtype))
        h = mcf.round_to(wide + u, p.dtype)
        return u.astype(p.dtype), mcf.store(y - (h - wide), lo.dtype)

    def start(w, dtype):
        hi = mcf.round_to(w, dtype)
        return hi, mcf.store(w - hi, jnp.bfloat16)

    return WeightCodec(
        jnp.dtype(jnp.bfloat16), ("bfloat16",), lambda p, lo: mcf.join(p, lo), step, start
    )


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _remainder16() -> WeightCodec:
    """The lower half of a float32 weight as int16: a float32 master, bit for bit.

    p is w rounded to bfloat16 with ties away from zero (one weight in 65,536), see `split_bits`.

    Subnormal weights are 0, as on devices that flush them. The two zeros are 2^31 apart as
    integers, and p can be either, so nothing is kept for them.
    """

    def zero(bits: Array) -> Array:
        return (bits & jnp.int32(0x7FFFFFFF)) < jnp.int32(0x00800000)

    def near(w: Array) -> Array:
        return jnp.where(zero(_bits(w)), 0.0, mcf.load(mcf.split_bits(w)[0]))

    def rest(bits: Array, h: Array) -> Array:
        kept = jnp.clip(bits - _bits(h), -(2**15), 2**15 - 1)
        return jnp.where(zero(bits), 0, kept).astype(jnp.int16)

    def step(p, lo, change, _):
        w = mcf.join_bits(p, lo) + change
        # float32, since a bfloat16 update cannot always move p to the required value.
        u = still(near(w) - mcf.load(p))
        return u, rest(_bits(w), applied(p, u))

    def start(w, dtype):
        del dtype
        hi = near(w)
        return hi, rest(_bits(w), hi)

    return WeightCodec(jnp.dtype(jnp.int16), ("bfloat16",), mcf.join_bits, step, start)


def _remainder8() -> WeightCodec:
    """The rounding error in steps of 1/256 ulp, as int8: a weight of 24 bits in 3 bytes.

    For float16 too, where a float16 lo would be below its smallest number.
    """

    def ulp(h: Array, dtype) -> Array:
        info = jnp.finfo(dtype)
        exponent = jnp.maximum((_bits(h) >> 23) & 0xFF, int(info.minexp) + 127)
        exponent = jnp.maximum(exponent - info.nmant, 1)
        return _float(exponent << 23)

    def join(p, lo):
        h = mcf.load(p)
        return h + mcf.load(lo) * (ulp(h, p.dtype) * 2.0**-8)

    def rest(w: Array, h: Array, dtype) -> Array:
        steps = jnp.round((w - h) / ulp(h, dtype) * 256)
        return jnp.clip(steps, -128, 127).astype(jnp.int8)

    def step(p, lo, change, _):
        w = join(p, lo) + change
        u = still(mcf.round_to(w, p.dtype) - mcf.load(p))
        return u, rest(w, applied(p, u), p.dtype)

    def start(w, dtype):
        h = mcf.round_to(w, dtype)
        return h, rest(w, h, dtype)

    return WeightCodec(jnp.dtype(jnp.int8), ("bfloat16", "float16"), join, step, start)


def _random() -> WeightCodec:
    """Stochastic rounding: nothing is kept, and the weight is right on average."""

    def step(p, lo, change, noise):
        wide = mcf.load(p)
        return still(mcf.stochastic(wide + change, noise) - wide), lo

    return WeightCodec(
        None, ("bfloat16",), lambda p, lo: mcf.load(p), step,
        lambda w, dtype: (mcf.round_to(w, dtype), None), noisy=True,
    )  # fmt: skip


def _nothing() -> WeightCodec:
    """Rounding to nearest: the rounding error is lost."""

    def step(p, lo, change, _):
        return mcf.store(still(change), p.dtype), lo

    return WeightCodec(
        None, ("bfloat16", "float16"), lambda p, lo: mcf.load(p), step,
        lambda w, dtype: (mcf.round_to(w, dtype), None),
    )  # fmt: skip


WEIGHTS: Mapping[str, WeightCodec] = {
    "bf16x2": _pair(),
    "int16": _remainder16(),
    "int8": _remainder8(),
    "sr": _random(),
    "none": _nothing(),
}


def weight(name: str) -> WeightCodec:
    """Returns the codec of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in WEIGHTS:
        raise ValueError(f"weights: unknown codec {name!r}; expected one of {[*WEIGHTS]}.")
    return WEIGHTS[name]


def kept_as(dtype: jnp.dtype) -> str:
    """Name of the codec whose kept part has this dtype."""
    return next(name for name, codec in WEIGHTS.items() if codec.dtype == dtype)
