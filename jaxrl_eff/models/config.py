"""The architecture of a decoder-only language model, as data.

One `LMConfig` describes Llama 2/3, Mistral, Qwen 2/2.5/3, Gemma 2 and Gemma 3 (text): their
differences are fields here, and the modules read fields, never a family's name. Only
`checkpoints.hf_config` maps a family's checkpoint to fields.

Not supported: mixtures of experts, encoders, partial rotary dimensions, and rotary scalings that
depend on the length at run time ("dynamic", "longrope").
"""

import dataclasses
import math
import numbers
from typing import Any

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu_tanh")
REMATS = ("none", "full", "dots", "attention", "outputs", "host")
HEADS = ("lm", "value")
DTYPES = ("float32", "bfloat16", "float16")
# Far above any model. A broken file could ask for larger sizes, which would fill host memory before
# any comparison with a checkpoint.
LARGEST = {
    "vocab": 2**28, "layers": 10_000, "width": 2**24, "heads": 2**16, "kv_heads": 2**16,
    "head_dim": 2**16, "ffn": 2**26, "max_length": 2**31 - 1,
}  # fmt: skip


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; expected one of {[*allowed]}.")


def _check_size(name: str, value: Any, largest: int) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 1 <= value <= largest:
        raise ValueError(f"{name}={value!r}, but it should be an integer from 1 to {largest}.")


def _check_number(name: str, value: Any, *, zero: bool = False) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        bound = "of at least 0" if zero else "above 0"
        raise ValueError(f"{name}={value!r}, but it should be a finite number {bound}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: angular frequencies theta^(-2i/H), then a scaling.

    Attributes:
        theta: base of the frequencies.
        kind: "default"; "linear" divides every frequency by `factor`; "llama3" divides the low
            frequencies, blending between two wavelengths; "yarn" (Peng et al. 2023,
            arXiv:2309.00071).
        factor: ratio of the stretched to the original context. Unused by "default".
        original_length: context in tokens before stretching ("llama3" and "yarn").
        low_freq_factor, high_freq_factor: "llama3": the blend is between the wavelengths
            original_length / low and original_length / high.
        beta_fast, beta_slow, truncate: "yarn": rotations over the original context that bound the
            blend, and True to round the bounds outward to whole dimensions.
        attention_factor: "yarn": factor on cos and sin; None: 0.1 ln(factor) + 1, or the ratio of
            its values with `mscale` and with `mscale_all_dim` where both are given.

    Example:
        >>> from jaxrl_eff.models import Rope
        >>> Rope(kind="linear", factor=4.0).theta
        10000.0
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        _check("Rope.kind", self.kind, ROPE_KINDS)
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast"):
            _check_number(f"Rope.{name}", getattr(self, name))
        if self.kind in ("llama3", "yarn") and self.original_length is None:
            raise ValueError(f"Rope(kind={self.kind!r}) needs original_length, which is None.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Sizes and options of a decoder-only transformer. Hashable, so it can be static under jit.

    Attributes:
        vocab, layers, width, heads, kv_heads, head_dim, ffn: V, L, D, N, K, H, F.
        family: name of the checkpoint format; only `checkpoints` reads it.
        norm_eps: added to the mean square in RMSNorm.
        norm_offset: True if the norm's weight is stored as w - 1, and multiplied in float32.
        post_norms: normalizes the output of attention and of the MLP before the residual sum.
        qk_norm: normalizes every query and key head before the rotation.
        qkv_bias, o_bias, mlp_bias: biases on those projections.
        act: "silu" or "gelu_tanh".
        rope: rotation of the global layers; `rope_local` of windowed layers, None: the same.
        tie: True if the unembedding is the embedding's transpose.
        embed_scale: True to multiply embeddings by sqrt(width), first rounded to the compute dtype.
        query_scale: factor on q.k; None: head_dim ** -0.5.
        attn_softcap, final_softcap: c tanh(x / c) on scores or logits; None: no cap.
        window: a windowed layer sees keys fewer than `window` positions back, itself included.
        windowed: for every layer, True if it has a window; () means all of them if `window` is set.
        max_length: longest sequence in tokens that the positions were trained for.
        bos, eos, pad: token ids; `eos` are all ids that end a response.
        dtype, param_dtype: compute dtype, and dtype of the parameters at initialization. Norms,
            softmax and logits are always float32.
        remat: what the backward pass recomputes: "none"; "dots" all but matrix products without
            batch dimensions; "attention" only the attention scores; "outputs" whole layers except
            the outputs of attention (over a sequence axis: no second ring); "full" whole layers;
            "host" as "outputs", with the inputs of layers offloaded to host memory.
        mlp_chunk: tokens of a row that go through an MLP at once, each chunk recomputed in the
            backward pass; 0: all.
        unroll: layers per iteration of the loop over layers; 0 fully unrolls up to eight layers,
            which is faster and still compiles quickly, and loops over deeper stacks.
        head: "lm" ends in the vocabulary, "value" in one number per token.
        init_std: standard deviation of the initial embeddings and projections.

    Example:
        >>> from jaxrl_eff import LMConfig
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> lm.score_scale, lm.replace(head="value").head
        (0.5, 'value')
    """

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    family: str = "llama"
    norm_eps: float = 1e-6
    norm_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    act: str = "silu"
    rope: Rope = Rope()
    rope_local: Rope | None = None
    tie: bool = False
    embed_scale: bool = False
    query_scale: float | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    max_length: int = 4096
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    mlp_chunk: int = 0
    unroll: int = 0
    head: str = "lm"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check("act", self.act, ACTIVATIONS)
        _check("remat", self.remat, REMATS)
        _check("head", self.head, HEADS)
        _check("dtype", self.dtype, DTYPES)
        _check("param_dtype", self.param_dtype, DTYPES)
        for name, largest in LARGEST.items():
            _check_size(name, getattr(self, name), largest)
        _check_number("norm_eps", self.norm_eps, zero=True)
        _check_number("init_std", self.init_std, zero=True)
        for name in ("query_scale", "attn_softcap", "final_softcap"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        if self.window is not None:
            _check_size("window", self.window, LARGEST["max_length"])
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotation needs pairs.")
        if not self.windowed:
            object.__setattr__(self, "windowed", (self.window is not None,) * self.layers)
        if len(self.windowed) != self.layers:
            raise ValueError(
                f"windowed has {len(self.windowed)} entries, but there are {self.layers} layers."
            )
        if any(self.windowed) and self.window is None:
            raise ValueError(f"windowed={self.windowed} needs a window, which is None.")

    @property
    def sight(self) -> int | None:
        """Number of positions a query sees in any layer, its own included; None: all."""
        return self.window if all(self.windowed) else None

    @property
    def score_scale(self) -> float:
        """The factor on q.k."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def loop_unroll(self) -> int:
        """Layers per iteration of the loop over layers, `unroll=0` resolved."""
        return self.unroll or (self.layers if self.layers <= 8 else 1)

    def replace(self, **changes: Any) -> "LMConfig":
        """Returns this configuration with some fields changed."""
        return dataclasses.replace(self, **changes)
