"""The table of parameters and their tensors in a checkpoint, and how their axes are flattened.

Reading (`hf_load`) and writing (`hf_save`) both use this table.
"""

import dataclasses
import math

import numpy as np

from jaxrl_eff.models.config import LMConfig

CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names of dtypes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Storage of one parameter.

    Attributes:
        path: of the parameter; those under `layers/` have a leading axis L.
        name: of the tensor, after the decoder's prefix; `{}` is the layer. A leading "/" means no
            prefix.
        axes: axis i of the tensor is the parameter's axes `axes[i]` (not counting L), flattened.
    """

    path: str
    name: str
    axes: tuple[tuple[int, ...], ...]

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    def shape(self, param: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the tensor's shape, given the parameter's shape without L."""
        return tuple(math.prod(param[a] for a in group) for group in self.axes)

    @property
    def order(self) -> list[int]:
        """The parameter's axes (without L) in the tensor's order."""
        return [axis for group in self.axes for axis in group]

    def fold(self, array: np.ndarray) -> np.ndarray:
        """Converts a parameter (of one layer) to its tensor."""
        return np.ascontiguousarray(array.transpose(self.order).reshape(self.shape(array.shape)))

    def unfold(self, stored: np.ndarray, param: tuple[int, ...]) -> np.ndarray:
        """Inverts `fold`, for a parameter of this shape (without L)."""
        return stored.reshape([param[a] for a in self.order]).transpose(np.argsort(self.order))

    def full_name(self, layer: int | None, prefix: str = "model.") -> str:
        """Returns the tensor's name in a checkpoint whose decoder has this prefix."""
        name = self.name.format(layer)
        return name[1:] if name[0] == "/" else prefix + name


def tensors(cfg: LMConfig) -> tuple[Tensor, ...]:
    """Returns a model's table. Matrices are stored [out, in], so most are transposed."""
    flip, heads, merge = ((1,), (0,)), ((1, 2), (0,)), ((2,), (0, 1))
    rows = [("embed/table", "embed_tokens.weight", ((0,), (1,)))]
    for x, axes, bias in (
        ("q", heads, cfg.qkv_bias),
        ("k", heads, cfg.qkv_bias),
        ("v", heads, cfg.qkv_bias),
        ("o", merge, cfg.o_bias),
    ):
        rows.append((f"layers/attn/{x}/kernel", f"layers.{{}}.self_attn.{x}_proj.weight", axes))
        if bias:
            flat = ((0,),) if x == "o" else ((0, 1),)
            rows.append((f"layers/attn/{x}/bias", f"layers.{{}}.self_attn.{x}_proj.bias", flat))
    for x in ("gate", "up", "down"):
        rows.append((f"layers/mlp/{x}/kernel", f"layers.{{}}.mlp.{x}_proj.weight", flip))
        if cfg.mlp_bias:
            rows.append((f"layers/mlp/{x}/bias", f"layers.{{}}.mlp.{x}_proj.bias", ((0,),)))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if cfg.post_norms:
        norms |= {
            "post_attn_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    if cfg.qk_norm:
        norms |= {"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}
    rows += [(f"layers/{a}/scale", f"layers.{{}}.{b}.weight", ((0,),)) for a, b in norms.items()]
    rows.append(("final_norm/scale", "norm.weight", ((0,),)))
    if cfg.head == "value":
        rows.append(("value/kernel", "/score.weight", flip))
    elif not cfg.tie:
        rows.append(("unembed/kernel", "/lm_head.weight", flip))
    return tuple(Tensor(*row) for row in rows)
