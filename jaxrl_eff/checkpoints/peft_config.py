"""PEFT's `adapter_config.json`, read as PEFT reads it or refused by name.

What a LoRA file means depends on more than its matrices: which modules are adapted and which are
kept whole, by patterns; what their first values did to the base model; and variants that compute
something else from the same tensors. `known.py` lists the fields.
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
    """The fields of an adapter that decide what it computes.

    Attributes:
        where: the file, for messages.
        rank, alpha: r and lora_alpha.
        method: of `lora.lora_scale`: "lora" or "rslora".
        dora: whether columns have a magnitude of their own.
        targets, excluded: a pattern, or names that modules end in.
        whole: names that modules kept whole end in.
        tied: a table that is kept whole stays tied to the head.
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
        """True if a module ("model.layers.0.self_attn.q_proj") has LoRA."""
        if _named(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", module) for m in self.whole):
            return False
        return _named(self.targets, module)

    def keeps(self, module: str) -> bool:
        """True if a module is kept whole: PEFT compares the ends of names, without their dots."""
        return any(module.endswith(name) for name in self.whole)


def _named(names: str | Iterable[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def read(path: Path, ignore: Collection[str] = ()) -> AdapterConfig:
    """Reads an `adapter_config.json`.

    Args:
        ignore: names of fields that are read as if the file did not hold them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field of another type or value than what is supported, or one that is not
            known and says something; named. Unknown ones that say nothing are a warning.
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
        whole = [*whole, "classifier", "score"]  # as PEFT adds by itself
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
