"""Initial values of adapters and of parameters trained with them, from files."""

import jax

from jaxrl_eff.checkpoints import load_peft
from jaxrl_eff.models import LMConfig
from jaxrl_eff.peft import lora
from jaxrl_eff.peft.config import AdaptSettings
from jaxrl_eff.peft.ways import whole_names


def started(s: AdaptSettings, lm: LMConfig) -> dict[str, jax.Array]:
    """Loads initial values from the directory `start`: leaves by name, none if it is empty.

    Raises:
        FileNotFoundError, ValueError: the files are missing or do not fit the settings.
    """
    if not s.start:
        return {}
    leaves = load_peft(s.start, lm, ignore=s.ignore)
    dora = s.name == "dora"
    shapes, _ = lora.lora_shapes(lm, s.rank, s.targets or lora.TARGETS, dora=dora)
    wanted = {*shapes, *whole_names(s, lm)}
    if wanted != set(leaves):
        lacking, more = (
            sorted(a - b)[:1] for a, b in ((wanted, set(leaves)), (set(leaves), wanted))
        )
        what = f"lacks {lacking[0]!r}" if lacking else f"has {more[0]!r} besides"
        raise ValueError(f"start is {s.start!r}, which {what}; see targets, whole and name.")
    for name, like in shapes.items():
        if leaves[name].shape != like.shape:
            raise ValueError(
                f"start is {s.start!r}, whose {name!r} is {list(leaves[name].shape)}, but with "
                f"rank {s.rank} it should be {list(like.shape)}."
            )
    return leaves
