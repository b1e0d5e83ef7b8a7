"""Exports of a run: models, adapters and delta files in public formats."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxrl_eff.checkpoints import deltas, save_hf
from jaxrl_eff.checkpoints.peft_files import save_peft
from jaxrl_eff.peft import lora, ways, weights
from jaxrl_eff.train import state


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Adds this path to system errors without a file name, including those of libraries."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # format of Rust libraries
            number = int(found[1])
        if number is None or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write(assembled: Any, done: Any, workdir: Path, console: Any) -> Path:
    """Writes the last trained model to WORKDIR/export, adapters merged, and returns that path.

    LoRA is also written in PEFT's format to WORKDIR/adapter, with its base model in WORKDIR/base
    unless it is already in a directory. Sparse changes of a model from a directory are also written
    as a delta file.

    A quantized base is dequantized instead of read again from its source: the adapters were trained
    with its codes and compensate some of their error.
    """
    stage, role = done.stage, done.stage.trained
    lm, part = stage.lms[role], stage.settings.adapt.get(role)
    trained = state.shared(done.models[role].params)
    with _telling(workdir / "export"):
        merged = state.merged(lm, trained)
        save_hf(workdir / "export", lm, merged, tokenizer_from=assembled.tokenizer)
    if part is None:
        return workdir / "export"
    kind, name = stage.origins[role]
    base = {"base": assembled.run.model.path, "directory": name}.get(kind, "")
    if part.name not in lora.METHODS:
        if base and not part.rank and jax.process_index() == 0:
            with _telling(workdir / "delta.safetensors"):
                _delta(base, workdir, part.name, console)
        return workdir / "export"
    if not base:
        base = str(workdir / "base")
        with _telling(workdir / "base"):
            merged = state.merged(lm, weights.base(weights.assembled(lm, trained)))
            save_hf(base, lm, merged, tokenizer_from=assembled.tokenizer)
    whole = ways.whole_names(part, lm)
    with _telling(workdir / "adapter"):
        save_peft(workdir / "adapter", lm, trained, base_model=base, whole=whole)
    console.final(f"adapter: {workdir / 'adapter'}, of {base}")
    return workdir / "export"


def _delta(base: str, workdir: Path, method: str, console: Any) -> None:
    """Writes the entries that training changed as a file that `jaxrl_eff.cli.delta` can revert."""
    before, after = (deltas.read_directory(d) for d in (base, workdir / "export"))
    if {k: v.dtype for k, v in before.items()} != {k: v.dtype for k, v in after.items()}:
        console.final(
            "no delta file: the base model has other dtypes than config.model.param_dtype"
        )
        return
    delta = deltas.diff(before, after, method=method)
    size = deltas.save(delta, workdir / "delta.safetensors")
    console.final(
        f"delta: {workdir / 'delta.safetensors'}, {delta.count:,} entries in {size:,} bytes; "
        f"python -m jaxrl_eff delta remove --model={workdir / 'export'} --delta=... gives the base"
    )
