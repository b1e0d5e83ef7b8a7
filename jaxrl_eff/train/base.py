"""The base model and the tokenizer that all stages of a run share, from its settings."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_eff.checkpoints import read_config
from jaxrl_eff.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from jaxrl_eff.models import LMConfig
from jaxrl_eff.models.config import Rope
from jaxrl_eff.schema import build
from jaxrl_eff.train.settings import Run

_SIZES = ("vocab", "layers", "width", "heads", "kv_heads", "head_dim", "ffn", "max_length")


def tokenizer(run: Run) -> Tokenizer:
    """Returns the tokenizer of all stages.

    Raises:
        ValueError, FileNotFoundError: the settings or the files are wrong.
    """
    if run.tokenizer == "chars:":
        raise ValueError("config.tokenizer is 'chars:' without the characters of an alphabet.")
    if run.tokenizer.startswith("chars:"):
        return CharTokenizer(run.tokenizer.removeprefix("chars:"))
    directory = run.model.path if run.tokenizer == "model" else run.tokenizer
    if not directory:
        raise ValueError(
            "config.tokenizer is 'model', but config.model.path is empty: give a model's "
            "directory, or 'chars:' and an alphabet."
        )
    return load_tokenizer(directory, ignore=run.model.ignore)


def model(run: Run, tokenizer: Tokenizer) -> LMConfig:
    """Returns the config of the base model, with a value for every setting.

    Raises:
        ValueError, FileNotFoundError: the settings or the config.json are wrong.
    """
    m = run.model
    if m.path and m.shape:
        raise ValueError("has both path and shape; a checkpoint brings its own shape.")
    if m.path:
        if not Path(m.path).is_dir():
            raise FileNotFoundError(f"path is {m.path!r}, which is no directory.")
        lm = read_config(m.path, ignore=m.ignore)
    else:
        special = {
            "vocab": tokenizer.vocab,
            "bos": tokenizer.bos,
            "eos": tuple(tokenizer.stop),
            "pad": tokenizer.pad,
        }
        for name, size in m.shape.items():
            if name in _SIZES and isinstance(size, int) and size < 1:
                raise ValueError(f"config.model.shape.{name} is {size}, but must be at least 1.")
        lm = build(LMConfig, {**special, **m.shape}, "config.model.shape")
    chosen = {k: getattr(m, k) for k in ("dtype", "param_dtype", "remat") if getattr(m, k)}
    if m.path and tokenizer.stop:
        chosen["eos"] = tuple(dict.fromkeys((*lm.eos, *tokenizer.stop)))
    if m.rope:
        chosen["rope"] = _stretched(lm, m.rope)
        chosen["max_length"] = int(lm.max_length * max(1.0, m.rope.get("factor", 1.0)))
    if m.max_length:
        chosen["max_length"] = m.max_length
    if lm.vocab < tokenizer.vocab:
        raise ValueError(
            f"the model's vocabulary of {lm.vocab} is smaller than the tokenizer's, "
            f"{tokenizer.vocab}."
        )
    return dataclasses.replace(lm, **chosen)


def _stretched(lm: LMConfig, changes: Mapping[str, Any]) -> Rope:
    """Returns a model's rotation with some fields changed.

    "ntk" increases the base of the frequencies, so that the slowest frequency is divided by
    `factor` and the fastest is unchanged: theta factor^(H / (H - 2)).

    Raises:
        ValueError: a field is unknown or has a wrong type, or "ntk" of a scaled rotation.
    """
    there, factor = dataclasses.asdict(lm.rope), changes.get("factor", 1.0)
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise ValueError(f"config.model.rope.factor is {factor!r:.200}, but must be above 0.")
    if changes.get("kind") == "ntk":
        if lm.rope.kind != "default" or set(changes) != {"kind", "factor"}:
            raise ValueError(
                f"config.model.rope is {dict(changes)}, of a rotation that is {lm.rope.kind!r}; "
                "ntk takes a factor alone, and a rotation without a scaling."
            )
        power = lm.head_dim / (lm.head_dim - 2)
        return dataclasses.replace(lm.rope, theta=lm.rope.theta * changes["factor"] ** power)
    if changes.get("kind", lm.rope.kind) in ("yarn", "llama3") and not there["original_length"]:
        there["original_length"] = lm.max_length
    given = {k: v for k, v in {**there, **changes}.items() if v is not None}
    return build(Rope, given, "config.model.rope")
