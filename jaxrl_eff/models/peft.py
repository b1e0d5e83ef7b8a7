"""LoRA and DoRA as directories that Hugging Face's PEFT reads and writes.

    adapter_config.json, adapter_model.safetensors

PEFT multiplies by lora_alpha / r, so that is what the file says whatever the scale came from.
Parameters that were trained whole, such as a value head, are PEFT's `modules_to_save`. A sparse
change has no such format: a model that has one is exported merged.
"""

import json
import math
import re
from collections.abc import Collection
from os import PathLike
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import tree
from jaxrl_eff.models import lora
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.hf_save import gathered
from jaxrl_eff.models.hf_table import Tensor, tensors
from jaxrl_eff.models.params import abstract
from jaxrl_eff.shapes import Array, PyTree

_PREFIX = "base_model.model.model."
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
    """Writes a model's LoRA for PEFT. In several processes all must call it; process 0 writes.

    Args:
        directory: made if it is not there; files of an adapter in it are replaced.
        params: with LoRA's leaves, sharded in any way.
        base_model: where the base model is, for PEFT's own loading.
        whole: names of parameters that are saved as they are; with them those of the same module.

    Raises:
        ValueError: there is no LoRA, or one that PEFT's format cannot say.
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
                stored[f"{_PREFIX}{name.format(layer)}.{_SUFFIXES[k]}"] = np.ascontiguousarray(
                    x.reshape(shaped[k]).T
                )
    if not stored:
        raise ValueError("the parameters have no LoRA to be saved.")
    kept = {_module(t) for t in tensors(cfg) if t.path in whole}
    if both := sorted(kept & set(modules)):
        raise ValueError(f"PEFT's format cannot say that {both} have LoRA and are trained whole.")
    for t in tensors(cfg):
        for layer in range(cfg.layers if t.stacked else 1) if _module(t) in kept else ():
            array = gathered(flat[t.path], layer if t.stacked else None, fetch=True)
            # float32, since safetensors' numpy reader has no bfloat16.
            stored[f"base_model.model.{t.full_name(layer)}"] = t.fold(array).astype(np.float32)
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
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(stored, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def load_peft(directory: str | PathLike[str], cfg: LMConfig) -> dict[str, Array]:
    """LoRA's leaves by name, float32, and the parameters saved whole, for `tree.with_leaves`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of adapter, tensors that are missing in some layer, of another
            shape, or of modules that the model does not have.
    """
    from safetensors.numpy import load_file

    directory = Path(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}.")
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    for field, allowed in (("peft_type", ("LORA",)), ("bias", ("none", None))):
        if config.get(field) not in allowed:
            raise ValueError(f"{directory}: {field} is {config.get(field)!r}, not {allowed[0]!r}.")
    for field in ("rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(field):
            raise ValueError(f"{directory}: {field} is {config[field]!r}, which is not read.")
    rank = config["r"]
    method = "rslora" if config.get("use_rslora") else "lora"
    scale = lora.lora_scale(method, float(config["lora_alpha"]), rank)
    stored = load_file(directory / "adapter_model.safetensors")
    out: dict[str, Array] = {}
    flat, rest = tree.flat(abstract(cfg)), set(stored)
    for path, name, inputs in _projections(cfg):
        shape = flat[f"{path}kernel"].shape[1:]
        shapes = {
            "lora_a": (*shape[:inputs], rank),
            "lora_b": (rank, *shape[inputs:]),
            "dora": shape[inputs:],
        }
        rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
        matrices = {"lora_a": (rank, rows), "lora_b": (columns, rank), "dora": (columns,)}
        for leaf, suffix in _SUFFIXES.items():
            names = [f"{_PREFIX}{name.format(layer)}.{suffix}" for layer in range(cfg.layers)]
            there = [k for k in names if k in stored]
            if not there:
                continue
            if missing := sorted(set(names) - set(there)):
                raise ValueError(f"{directory} has no {missing[0]!r}, but other layers' like it.")
            for k in names:
                if stored[k].shape != matrices[leaf]:
                    raise ValueError(f"{k!r} is {stored[k].shape}, but should be {matrices[leaf]}.")
            layers = [jnp.asarray(stored[k].astype(np.float32).T) for k in names]
            out[path + leaf] = jnp.stack(layers).reshape(cfg.layers, *shapes[leaf])
            rest -= set(names)
        if f"{path}lora_a" in out:
            out[f"{path}lora_scale"] = jnp.full(cfg.layers, scale, jnp.float32)
    for t in tensors(cfg):
        names = [
            f"base_model.model.{t.full_name(i)}" for i in range(cfg.layers if t.stacked else 1)
        ]
        if not set(names) <= rest:
            continue
        like = flat[t.path]
        inner = like.shape[1:] if t.stacked else like.shape
        for k in names:
            if stored[k].shape != t.shape(inner):
                raise ValueError(f"{k!r} is {stored[k].shape}, but should be {t.shape(inner)}.")
        parts = [jnp.asarray(t.unfold(stored[k], inner), like.dtype) for k in names]
        out[t.path] = jnp.stack(parts) if t.stacked else parts[0]
        rest -= set(names)
    if rest:
        raise ValueError(f"{directory} has {sorted(rest)[0]!r}, which the model does not have.")
    return out


def _module(t: Tensor) -> str:
    """What PEFT calls the module of a tensor: "q_proj", "score"."""
    return t.name.rpartition(".")[0].rpartition(".")[2].removeprefix("/")


def _projections(cfg: LMConfig) -> list[tuple[str, str, int]]:
    """Of each projection: its parameters' path, PEFT's module with {} for the layer, input axes."""
    able = lora.targets(cfg, (".*",))
    return [
        (t.path.removesuffix("kernel"), re.sub(r"\.weight$", "", t.name),
         lora.inputs_of(able[t.path][1:]))
        for t in tensors(cfg)
        if t.path in able
    ]  # fmt: skip
