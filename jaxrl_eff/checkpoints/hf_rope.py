"""Conversion between rotary embeddings in Hugging Face's `config.json` and `Rope`.

Both spellings are read, with transformers' precedence: a non-empty `rope_scaling` (transformers 4)
replaces `rope_parameters` (transformers 5); in Gemma 3 it is merged into those of the full layers.
The base is the `rope_theta` within either, else that of the file, else the family's default. The
older spelling is written, since both versions read it.
"""

from typing import Any

from jaxrl_eff import fields
from jaxrl_eff.checkpoints.known_fields import ROPE
from jaxrl_eff.models.config import ROPE_KINDS, Rope

_LAYERS = ("full_attention", "sliding_attention")
_LONGEST = 2**31 - 1


def ropes(
    where: str, family: str, given: dict[str, Any], idle: list[str]
) -> tuple[Rope, Rope | None]:
    """Returns the rotations of the global layers and, if the family differs, of the windowed ones.

    Args:
        where: source of the fields, for messages.
        given: the fields of `config.json`, with the family's defaults.
        idle: receives the names of unknown fields without effect.

    Raises:
        ValueError: a field has a wrong type or value, or is unknown; the message names it.
    """
    old = fields.mapping(where, "rope_scaling", given.get("rope_scaling"))
    new = fields.mapping(where, "rope_parameters", given.get("rope_parameters"))
    if family != "gemma3_text":
        name, chosen = ("rope_scaling", old) if old else ("rope_parameters", new)
        return _rope(where, name, chosen, "rope_theta", given, idle), None
    for name in new:
        if name not in _LAYERS:
            raise ValueError(
                f"{where}: rope_parameters has {name!r}, but for {family} it should have "
                f"{' and '.join(_LAYERS)} alone."
            )
    first, second = (f"rope_parameters.{name}" for name in _LAYERS)
    full, local = (
        fields.mapping(where, f"rope_parameters.{name}", new.get(name)) for name in _LAYERS
    )
    rope = _rope(where, "rope_scaling" if old else first, full | old, "rope_theta", given, idle)
    return rope, _rope(where, second, local, "rope_local_base_freq", given, idle)


def _rope(
    where: str, name: str, raw: dict[str, Any], base: str, given: dict[str, Any], idle: list[str]
) -> Rope:
    """Reads one rotation from its object; `base` names the fallback field for theta."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"{where}: {name}: unknown rope_type {fields.short(kind)}; expected one of "
            f"{[*ROPE_KINDS]}."
        )
    inside, only = f"{where}: {name}", {"partial_rotary_factor": (None, 1)}
    idle += fields.checked(where, raw, ROPE[kind], only=only, prefix=f"{name}.")
    own = raw.get("rope_theta")
    theta = given[base] if own is None else own
    theta = float(
        fields.number(where, base if own is None else f"{name}.rope_theta", theta, 0, above=True)
    )
    if kind == "default":
        return Rope(theta=theta)
    length = given["max_position_embeddings"]
    original = raw.get("original_max_position_embeddings")
    original = length if original is None else original
    fields.integer(inside, "original_max_position_embeddings", original, 1, _LONGEST)
    factor = raw.get("factor")
    if factor is None and kind == "yarn":
        factor = length / original
    if factor is None:
        raise ValueError(f"{inside}: rope_type={kind!r} needs a factor, which is not there.")
    factor = float(fields.number(inside, "factor", factor, 0, above=True))
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=factor)
    shared = {"theta": theta, "kind": kind, "factor": factor, "original_length": original}
    if kind == "llama3":
        return Rope(**shared, **_blend(inside, raw))
    return Rope(**shared, **_yarn(inside, raw))


def _blend(where: str, raw: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name in ("low_freq_factor", "high_freq_factor"):
        if name not in raw:
            raise ValueError(f"{where}: rope_type='llama3' has no {name!r}.")
        found[name] = float(fields.number(where, name, raw[name], 0, above=True))
    if found["low_freq_factor"] >= found["high_freq_factor"]:
        raise ValueError(
            f"{where}: low_freq_factor={raw['low_freq_factor']} should be below "
            f"high_freq_factor={raw['high_freq_factor']}."
        )
    return found


def _yarn(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = raw.get(name) or default
        found[name] = float(fields.number(where, name, value, 0, above=True))
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        value = raw.get(name)
        found[name] = None if value is None else fields.number(where, name, value, 0)
    truncate = raw.get("truncate", True)
    return found | {"truncate": fields.switch(where, "truncate", truncate)}


def scaling(rope: Rope) -> dict[str, Any] | None:
    """Returns the `rope_scaling` of a rotation; None for the default rotation."""
    if rope.kind == "default":
        return None
    raw: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind != "linear":
        raw["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        raw |= {k: getattr(rope, k) for k in ("beta_fast", "beta_slow", "truncate")}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                raw[name] = getattr(rope, name)
    return raw
