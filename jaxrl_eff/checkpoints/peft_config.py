"""Reading of PEFT's `adapter_config.json`, as PEFT reads it; unsupported fields are rejected.

The meaning of a LoRA file depends on more than its matrices: which modules are adapted and which
are saved in full, by patterns; how their initialization changed the base model; and variants that
compute something else from the same tensors. `known_fields` lists the fields.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from jaxrl_eff import fields
from jaxrl_eff.checkpoints import known_fields

_TASKS = ("CAUSAL_LM", "SEQ_CLS", None)
_LARGEST = 2**20  # of a rank


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter that determine what it computes.

    Attributes:
        where: the file, for messages.
        rank, alpha: r and lora_alpha.
        method: of `lora.lora_scale`: "lora" or "rslora".
        dora: True if columns have their own magnitude.
        targets, excluded: a pattern, or suffixes of module names.
        whole: suffixes of names of modules that are saved in full.
        tied: True if a table that is saved in full stays tied to the head.
    """

    where: str
    rank: int
    alpha: float
    method: str
    dora: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    whole: tuple[str, ...]
    tied: bool

    def adapts(self, module: str) -> bool:
        """Returns True if a module ("model.layers.0.self_attn.q_proj") has LoRA."""
        if _named(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", module) for m in self.whole):
            return False
        return _named(self.targets, module)

    def keeps(self, module: str) -> bool:
        """Returns True if a module is saved in full: PEFT compares suffixes, not dotted parts."""
        return any(module.endswith(name) for name in self.whole)


def _named(names: str | Iterable[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def read(path: Path, ignore: Collection[str] = ()) -> AdapterConfig:
    """Reads an `adapter_config.json`.

    Args:
        ignore: names of fields to ignore.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field has an unsupported type or value, or an unknown field has an effect; the
            message names it. Unknown fields without effect cause a warning.
    """
    where = str(path)
    raw = fields.without(fields.read_json(path), ignore)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {fields.short(raw.get('peft_type'))}, not 'LORA'.")
    idle = fields.checked(
        where, raw, known_fields.LORA_READ | known_fields.LORA_HARMLESS, only=known_fields.LORA_ONLY
    )
    _check_values(where, raw)
    on = {
        name: raw.get(name) is not None and fields.switch(where, name, raw[name])
        for name in ("use_rslora", "use_dora", "ensure_weight_tying")
    }
    for name in ("r", "lora_alpha"):
        if name not in raw:
            raise ValueError(f"{where} has no {name!r}.")
    fields.warn(where, idle)
    whole = fields.texts(where, "modules_to_save", raw.get("modules_to_save"))
    if raw.get("task_type") == "SEQ_CLS":
        whole = [*whole, "classifier", "score"]  # PEFT adds these implicitly
    return AdapterConfig(
        where=where,
        rank=fields.integer(where, "r", raw["r"], 1, _LARGEST),
        alpha=float(fields.number(where, "lora_alpha", raw["lora_alpha"])),
        method="rslora" if on["use_rslora"] else "lora",
        dora=on["use_dora"],
        targets=_modules(where, "target_modules", raw.get("target_modules")),
        excluded=_modules(where, "exclude_modules", raw.get("exclude_modules")),
        whole=tuple(whole),
        tied=on["ensure_weight_tying"],
    )


def _check_values(where: str, raw: dict[str, Any]) -> None:
    first = raw.get("init_lora_weights")
    text = first.lower() if isinstance(first, str) else first
    plain = text is None or isinstance(text, bool | str)
    if not plain or text not in known_fields.INITS:
        raise ValueError(
            f"{where}: init_lora_weights={fields.short(first)} is not supported: such first values "
            "change the base model, too, or what the matrices mean. Supported are "
            f"{', '.join(map(repr, known_fields.INITS))}; PEFT converts an adapter to one of them "
            "on saving (path_initial_model_for_weight_conversion)."
        )
    if not any(raw.get("task_type") == task for task in _TASKS):
        raise ValueError(
            f"{where}: task_type={fields.short(raw['task_type'])} is not supported; it may be "
            f"{' or '.join(map(repr, _TASKS))}."
        )
    if raw.get("target_modules") in (None, "all-linear"):
        raise ValueError(
            f"{where}: target_modules={raw.get('target_modules')!r} leaves the modules to PEFT; "
            "it should name them."
        )


def _modules(where: str, name: str, value: Any) -> str | tuple[str, ...]:
    if not isinstance(value, str):
        return tuple(fields.texts(where, name, value))
    try:
        re.compile(value)
    except (re.error, RecursionError) as error:
        raise ValueError(f"{where}: {name}={fields.short(value)} is no pattern: {error}.") from None
    return value
