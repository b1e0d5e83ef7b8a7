"""Saving of parameters as a directory that transformers loads.

One layer's tensor is fetched at a time and streamed to its file, so the host never holds the whole
model; sizes, and therefore a file's header, are known before any value is.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import fields, files, tree
from jaxrl_eff.checkpoints.hf_config_write import write_config
from jaxrl_eff.checkpoints.hf_names import CODES, Tensor, tensors
from jaxrl_eff.models import params as lm_params
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.types import Array, PyTree

_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|vocab\.json|merges\.txt|added_tokens\.json|"
    r"chat_template\..*"
)
_EXPORTED = re.compile(
    r"config\.json|generation_config\.json|model.*\.safetensors|model\.safetensors\.index\.json|"
    + _TOKENIZER.pattern
)


def save_hf(
    directory: str | PathLike[str],
    cfg: LMConfig,
    params: PyTree,
    *,
    tokenizer_from: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers (and `load_hf`) can read.

    It has `config.json`, `generation_config.json`, the weights in their current dtype, and the
    tokenizer. `head="value"` is written as a sequence classifier with one label, with the head as
    `score.weight`. The directory is written atomically; one written earlier by this function is
    replaced. With several processes all must call it; process 0 writes.

    Args:
        directory: output directory.
        cfg: of the model.
        params: structured as `params.abstract(cfg)`, with any sharding.
        tokenizer_from: a directory whose tokenizer files and generation settings are copied, or a
            tokenizer with `save(directory)`; None: none.
        shard_bytes: maximum size of a weight file, unless a single tensor is larger.

    Raises:
        FileExistsError: the directory has files that this function does not write.
        NotADirectoryError: it is a link or not a directory.
        ValueError: the family's format cannot represent `cfg`, or parameters have a wrong shape.

    Example:
        >>> from pathlib import Path
        >>> from jaxrl_eff import LMConfig, init, save_hf
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> save_hf("saved", lm, init(lm, jax.random.key(0)))
        >>> sorted(path.name for path in Path("saved").iterdir())
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    directory = Path(directory)
    leaves = {tree.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for path, like in jax.tree_util.tree_leaves_with_path(lm_params.abstract(cfg)):
        name = tree.path_name(path)
        if name not in leaves or leaves[name].shape != like.shape:
            there = list(leaves[name].shape) if name in leaves else "missing"
            raise ValueError(f"parameter {name!r} is {there}, but it should be {list(like.shape)}.")
    raw = write_config(cfg.replace(param_dtype=str(leaves["embed/table"].dtype)))
    _refuse_foreign(directory)
    writer = jax.process_index() == 0
    partial = directory.with_name(f".{directory.name}.partial")
    if writer:
        files.remove(partial)
        partial.mkdir(parents=True)
        _write_texts(partial, cfg, raw, tokenizer_from)
    _write_weights(partial if writer else None, list(_pieces(cfg, leaves)), leaves, shard_bytes)
    if writer:
        _swap(partial, directory)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"save_hf {directory}")


def _refuse_foreign(directory: Path) -> None:
    if not os.path.lexists(directory):
        return
    files.directory(directory)
    for name in sorted(p.name for p in directory.iterdir()):
        if not _EXPORTED.fullmatch(files.left_behind(name) or name):
            raise FileExistsError(f"{directory} holds {name!r}; it would be lost.")


def _swap(partial: Path, directory: Path) -> None:
    if not directory.exists():
        partial.rename(directory)
        return
    previous = directory.with_name(f".{directory.name}.previous")
    files.remove(previous)
    directory.rename(previous)
    partial.rename(directory)
    files.remove(previous)


def _write_texts(to: Path, cfg: LMConfig, raw: dict[str, Any], tokenizer_from: Any) -> None:
    generation: dict[str, Any] = {}
    if hasattr(tokenizer_from, "save"):
        tokenizer_from.save(to)
    elif tokenizer_from is not None:
        source = Path(tokenizer_from)
        for path in source.iterdir():
            if path.is_file() and _TOKENIZER.fullmatch(path.name):
                shutil.copyfile(path, to / path.name)
        if (source / "generation_config.json").exists():
            generation = fields.read_json(source / "generation_config.json")
    ids = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation |= {k: v for k, v in ids.items() if v is not None}
    for name, value in (("config.json", raw), ("generation_config.json", generation)):
        (to / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One tensor to write."""

    name: str
    tensor: Tensor
    layer: int | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _pieces(cfg: LMConfig, leaves: dict[str, Array]) -> Iterator[_Piece]:
    for tensor in tensors(cfg):
        leaf = leaves[tensor.path]
        inner = leaf.shape[1:] if tensor.stacked else leaf.shape
        for layer in range(leaf.shape[0]) if tensor.stacked else (None,):
            yield _Piece(
                tensor.full_name(layer), tensor, layer, tensor.shape(inner), jnp.dtype(leaf.dtype)
            )


def _write_weights(
    to: Path | None, pieces: list[_Piece], leaves: dict[str, Array], shard_bytes: int
) -> None:
    """Writes the files and their index; with `to=None` only takes part in the gathering."""
    files: list[list[_Piece]] = [[]]
    for piece in pieces:
        if files[-1] and sum(p.nbytes for p in files[-1]) + piece.nbytes > shard_bytes:
            files.append([])
        files[-1].append(piece)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, members in zip(names, files, strict=True):
        with open(to / name, "wb") if to else nullcontext() as file:
            if file:
                file.write(_header(members))
            for piece in members:
                array = gathered(leaves[piece.tensor.path], piece.layer, fetch=file is not None)
                if file:
                    file.write(piece.tensor.fold(array).tobytes())
    if to and len(files) > 1:
        index = {
            "metadata": {"total_size": sum(p.nbytes for p in pieces)},
            "weight_map": {p.name: n for n, ps in zip(names, files, strict=True) for p in ps},
        }
        path = to / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(pieces: list[_Piece]) -> bytes:
    """Returns the start of a safetensors file: 8 bytes of length, then JSON, padded to 8 bytes."""
    codes = {dtype: code for code, dtype in CODES.items()}
    # transformers rejects files that do not name their framework's layout.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in pieces:
        if str(piece.dtype) not in codes:
            raise ValueError(f"{piece.name!r} is {piece.dtype}; expected one of {[*codes]}.")
        end = start + piece.nbytes
        header[piece.name] = {
            "dtype": codes[str(piece.dtype)],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def gathered(leaf: Array, layer: int | None, *, fetch: bool) -> np.ndarray | None:
    """Gathers one layer of a parameter (or all of one without layers) on this host."""
    if jax.process_count() > 1:
        # Every process takes part, so that the writing process receives the others' shards.
        leaf = _whole(leaf.sharding.mesh)(leaf, layer).addressable_data(0)
    elif layer is not None:
        leaf = _whole(None)(leaf, layer)
    return np.asarray(leaf) if fetch else None


@lru_cache(maxsize=8)
def _whole(mesh: jax.sharding.Mesh | None) -> Any:
    """Returns a function that takes one layer (`None`: the whole array), replicated on the mesh."""

    def take(leaf: Array, layer: Array | None) -> Array:
        if layer is None:
            return leaf
        return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)

    if mesh is None:
        return jax.jit(take)
    return jax.jit(
        take, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
