"""Reading and writing of LoRA and DoRA as directories of Hugging Face's PEFT.

    adapter_config.json, adapter_model.safetensors

PEFT multiplies by lora_alpha / r, so the file always stores the scale in this form. Parameters that
were trained in full, such as a value head, are PEFT's `modules_to_save`. Sparse changes have no
such format: a model with them is exported merged.
"""

import json
import math
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import files, tree
from jaxrl_eff.checkpoints import peft_config
from jaxrl_eff.checkpoints.hf_names import CODES, Tensor, tensors
from jaxrl_eff.checkpoints.hf_save import gathered
from jaxrl_eff.checkpoints.peft_config import AdapterConfig
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.params import abstract
from jaxrl_eff.peft import lora
from jaxrl_eff.types import Array, PyTree

_BASE = "base_model.model."
# The table and the head, one tensor where they are tied.
_TIED = ("model.embed_tokens", "lm_head")
_SUFFIXES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "dora": "lora_magnitude_vector",
}


def save_peft(
    directory: str | PathLike[str],
    cfg: LMConfig,
    params: PyTree,
    *,
    base_model: str = "",
    whole: Collection[str] = (),
) -> None:
    """Writes a model's LoRA for PEFT. With several processes all must call it; process 0 writes.

    Args:
        directory: created if missing; files of an adapter in it are replaced.
        params: with LoRA's leaves and any sharding.
        base_model: location of the base model, for PEFT's own loading.
        whole: names of parameters to save in full, together with others of the same module.

    Raises:
        ValueError: there is no LoRA, or PEFT's format cannot represent it.
    """
    flat, stored, modules = tree.flat(params), {}, []
    scales: set[float] = set()
    ranks: set[int] = set()
    for path, name, _ in _projections(cfg):
        if f"{path}lora_a" not in flat:
            continue
        modules.append(name.rpartition(".")[2])
        rank = flat[f"{path}lora_b"].shape[1]
        ranks.add(rank)
        for layer in range(cfg.layers):
            here = {
                k: gathered(flat[path + k], layer, fetch=True)
                for k in (*_SUFFIXES, "lora_scale")
                if path + k in flat
            }
            scales.add(float(here.pop("lora_scale")))
            rows = math.prod(here["lora_a"].shape[:-1])
            shaped = {"lora_a": (rows, rank), "lora_b": (rank, -1), "dora": (-1,)}
            for k, x in here.items():
                stored[f"{_BASE}model.{name.format(layer)}.{_SUFFIXES[k]}"] = np.ascontiguousarray(
                    x.reshape(shaped[k]).T
                )
    if not stored:
        raise ValueError("the parameters have no LoRA to be saved.")
    kept = check_exportable(cfg, modules, whole)
    for t in tensors(cfg):
        for layer in range(cfg.layers if t.stacked else 1) if _module(t) in kept else ():
            array = gathered(flat[t.path], layer if t.stacked else None, fetch=True)
            # float32, since safetensors' numpy reader has no bfloat16.
            stored[f"{_BASE}{t.full_name(layer)}"] = t.fold(array).astype(np.float32)
    table, head = (f"{_BASE}{name}.weight" for name in _TIED)
    tied = cfg.tie and cfg.head == "lm" and table in stored
    if tied:
        stored[head] = stored[table].copy()
    if len(scales) > 1 or len(ranks) > 1:
        raise ValueError(f"PEFT wants one scale and one rank, got {sorted(scales)}, {ranks}.")
    if jax.process_index():
        return
    from safetensors.numpy import save_file

    rank, alpha = ranks.pop(), scales.pop()
    alpha *= rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if cfg.head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "use_rslora": False,
        "use_dora": any(k.endswith("lora_magnitude_vector") for k in stored),
        "fan_in_fan_out": False,
        "modules_to_save": sorted(kept) or None,
        # Without this, PEFT's copy of a table would not be the head's.
        "ensure_weight_tying": tied,
        "inference_mode": True,
    }
    directory = files.directory(directory)
    text = json.dumps(config, indent=2) + "\n"
    files.write(directory / "adapter_config.json", text)
    with files.replacing(directory / "adapter_model.safetensors") as partial:
        save_file(stored, partial, metadata={"format": "pt"})


def check_exportable(
    cfg: LMConfig, adapted: Collection[str], whole: Collection[str] = ()
) -> list[str]:
    """Checks that PEFT's format can represent the adapted modules and those trained in full.

    Args:
        adapted: PEFT's modules with LoRA ("q_proj"), or parameter names (".../q/kernel").
        whole: names of parameters that are trained in full.

    Returns:
        The modules to save, by names that PEFT does not confuse with other modules.

    Raises:
        ValueError: a module is in both.
    """
    modules = {_module(t): t for t in tensors(cfg)}
    kept = {_module(t) for t in tensors(cfg) if t.path in whole}
    have = {_module(t) for t in tensors(cfg) if t.path in adapted} | (set(modules) & set(adapted))
    if both := sorted(kept & have):
        raise ValueError(f"PEFT's format cannot say that {both} have LoRA and are trained whole.")
    return sorted(kept)


def load_peft(
    directory: str | PathLike[str], cfg: LMConfig, *, ignore: Collection[str] = ()
) -> dict[str, Array]:
    """Loads LoRA's leaves by name, float32, and parameters saved in full, for `tree.with_leaves`.

    Args:
        cfg: of the base model, with the desired head.
        ignore: names of fields of `adapter_config.json` and of tensors to ignore; in a tensor's
            name `*` matches anything.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of adapter; an unsupported or unknown field; tensors that are
            missing in some layer, have a wrong shape, are not named by the configuration, or belong
            to modules that the model lacks; a tied table without its head.
    """
    directory = Path(directory)
    path = directory / "adapter_model.safetensors"
    for name in ("adapter_config.json", path.name):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}.")
    config = peft_config.read(directory / "adapter_config.json", ignore)
    for module in (*_TIED, "model.norm", "score"):
        if config.adapts(module):
            raise ValueError(
                f"{config.where}: target_modules names {module!r}, but only projections of the "
                "layers can have LoRA here."
            )
    scale = lora.lora_scale(config.method, config.alpha, config.rank)
    stored = _stored(path, ignore)
    out: dict[str, Array] = {}
    flat, rest = tree.flat(abstract(cfg)), set(stored)
    for path_, name, inputs in _projections(cfg):
        shape = flat[f"{path_}kernel"].shape[1:]
        shapes = {
            "lora_a": (*shape[:inputs], config.rank),
            "lora_b": (config.rank, *shape[inputs:]),
            "dora": shape[inputs:],
        }
        rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
        matrices = {
            "lora_a": (config.rank, rows), "lora_b": (columns, config.rank), "dora": (columns,),
        }  # fmt: skip
        wanted = _targeted(config, [name.format(layer) for layer in range(cfg.layers)])
        for leaf, suffix in _SUFFIXES.items():
            names = [f"{_BASE}model.{name.format(layer)}.{suffix}" for layer in range(cfg.layers)]
            if not wanted or (leaf == "dora" and not config.dora):
                continue
            if missing := [k for k in names if k not in stored]:
                raise ValueError(f"{directory} has no {missing[0]!r}, which it should have.")
            for k in names:
                _check_shape(directory, k, stored[k], matrices[leaf])
            layers = [jnp.asarray(stored[k].astype(np.float32).T) for k in names]
            out[path_ + leaf] = jnp.stack(layers).reshape(cfg.layers, *shapes[leaf])
            rest -= set(names)
        if wanted:
            out[f"{path_}lora_scale"] = jnp.full(cfg.layers, scale, jnp.float32)
    rest -= _load_whole(directory, config, cfg, stored, rest, out)
    if rest:
        raise ValueError(
            f"{directory} has {sorted(rest)[0]!r}, which its configuration does not name or the "
            "model does not have."
        )
    if not any(name.endswith("lora_a") for name in out):
        raise ValueError(f"{config.where}: target_modules names no module of the model's layers.")
    return out


def _stored(path: Path, ignore: Collection[str]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    for name, array in stored.items():
        if str(array.dtype) not in CODES.values():
            raise ValueError(
                f"{path}: {name!r} is {array.dtype}; expected one of {[*CODES.values()]}."
            )
    return {k: v for k, v in stored.items() if not any(fnmatchcase(k, i) for i in ignore)}


def _targeted(config: AdapterConfig, modules: list[str]) -> bool:
    """Returns True if a projection has LoRA, which it must have in all layers or in none."""
    have = [config.adapts(f"model.{module}") for module in modules]
    if any(have) and not all(have):
        raise ValueError(
            f"{config.where}: target_modules names {modules[have.index(True)]!r}, but not "
            f"{modules[have.index(False)]!r}: some layers only, which is not supported."
        )
    return all(have)


def _check_shape(directory: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{directory}: {name!r} is {array.shape}, but should be {shape}.")


def _load_whole(
    directory: Path,
    config: AdapterConfig,
    cfg: LMConfig,
    stored: dict[str, np.ndarray],
    rest: set[str],
    out: dict[str, Array],
) -> set[str]:
    """Adds the parameters that were saved in full to `out`; returns the names of their tensors."""
    flat, used = tree.flat(abstract(cfg)), set()
    table, head = (f"{_BASE}{name}.weight" for name in _TIED)
    kept = {m: config.keeps(m) for m in _TIED}
    tied = cfg.tie and cfg.head == "lm"
    if tied and any(kept.values()):
        for name in (table, head):
            if name not in rest:
                raise ValueError(
                    f"{config.where}: modules_to_save={list(config.whole)} has a table that the "
                    f"model ties to its head, but {name!r} is not in the file: PEFT trained one of "
                    "the two alone, which a tied model cannot be; see its ensure_weight_tying."
                )
    if tied and head in rest:
        if table not in rest or not np.array_equal(stored[table], stored[head]):
            raise ValueError(
                f"{directory}: {head!r} is not the same as {table!r}, but the model ties them."
            )
        used.add(head)
    for t in tensors(cfg):
        layers = range(cfg.layers) if t.stacked else (None,)
        names = [_BASE + t.full_name(layer) for layer in layers]
        modules = [t.full_name(layer).rpartition(".")[0] for layer in layers]
        there = [k in rest for k in names]
        wanted = [config.keeps(m) for m in modules]
        if not any(there) and not any(wanted):
            continue
        if missing := [k for k, here in zip(names, there, strict=True) if not here]:
            raise ValueError(f"{directory} has no {missing[0]!r}, which modules_to_save names.")
        # PEFT also stores tables that it adapted or resized, and loads these into the base.
        if not all(wanted) and modules[0] not in _TIED:
            raise ValueError(
                f"{config.where}: modules_to_save={list(config.whole)} does not name the module "
                f"of {names[0]!r}, which is in the file."
            )
        like = flat[t.path]
        inner = like.shape[1:] if t.stacked else like.shape
        for k in names:
            _check_shape(directory, k, stored[k], t.shape(inner))
        parts = [jnp.asarray(t.unfold(stored[k], inner), like.dtype) for k in names]
        out[t.path] = jnp.stack(parts) if t.stacked else parts[0]
        used |= set(names)
    return used


def _module(t: Tensor) -> str:
    """Returns a suffix of PEFT's names for only this tensor's modules: "q_proj", "score".

    PEFT compares suffixes, and "norm" is one of "input_layernorm": a tensor outside the layers has
    its full name.
    """
    module = t.full_name(0).rpartition(".")[0]
    return module.rpartition(".")[2] if t.stacked else module


def _projections(cfg: LMConfig) -> list[tuple[str, str, int]]:
    """Returns for each projection: its path, PEFT's module with {} for the layer, input axes."""
    able = lora.targets(cfg, (".*",))
    return [
        (t.path.removesuffix("kernel"), re.sub(r"\.weight$", "", t.name),
         lora.inputs_of(able[t.path][1:]))
        for t in tensors(cfg)
        if t.path in able
    ]  # fmt: skip
