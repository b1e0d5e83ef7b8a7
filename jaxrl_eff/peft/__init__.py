"""Training of a part of a model: sparse entries, LoRA, quantized bases, layers in turn.

`AdaptSettings` names the part; `spec` turns it into the `core.Spec` of a model. The names below are
public, everything else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__, {"config": ("AdaptSettings",), "ways": ("spec",)}
)
