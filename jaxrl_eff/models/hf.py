"""Hugging Face safetensors <-> parameters, a slice at a time.

One table (`tensors`) says which tensor of a checkpoint each parameter is, and how its axes are
folded; reading and writing both follow it. Reading fills every shard of the target sharding with
the bytes it needs and no others, so neither a host nor a device ever holds the whole model.
Writing fetches one layer's tensor at a time and streams it into the file.

Left out: pickled checkpoints (`.bin`, `.pt`), which run code when read; quantized tensors.
"""

import dataclasses
import json
import math
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import tree
from jaxrl_eff.models import params as lm_params
from jaxrl_eff.models.config import DTYPES, LMConfig
from jaxrl_eff.models.hf_config import config_from_hf, config_to_hf, read_json
from jaxrl_eff.shapes import Array, PyTree

__all__ = ["config_from_hf", "config_to_hf", "load_hf", "save_hf", "tensors"]

_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_VALUE_NAMES = ("score.weight", "v_head.weight", "v_head.summary.weight", "value_head.weight")
# Where a checkpoint keeps the decoder: alone, within an image-text model (two spellings), bare.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
_BUFFERS = re.compile(r".*rotary_emb\.inv_freq")
_EXPORTED = re.compile(
    r"config\.json|generation_config\.json|model.*\.safetensors|model\.safetensors\.index\.json|"
    r"tokenizer.*|special_tokens_map\.json|vocab\.json|merges\.txt|added_tokens\.json|"
    r"chat_template\..*"
)
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|vocab\.json|merges\.txt|added_tokens\.json|"
    r"chat_template\..*"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """How one parameter is stored.

    Attributes:
        path: of the parameter; those under `layers/` have a leading axis L.
        name: of the tensor, behind the decoder's prefix; `{}` is the layer. A leading "/" means
            no prefix.
        axes: axis i of the tensor is the parameter's axes `axes[i]` (L not counted), flattened.
    """

    path: str
    name: str
    axes: tuple[tuple[int, ...], ...]

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    def shape(self, param: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from the parameter's shape without L."""
        return tuple(math.prod(param[a] for a in group) for group in self.axes)


def tensors(cfg: LMConfig) -> tuple[Tensor, ...]:
    """The table of a model's parameters. Matrices are stored [out, in], so most are transposed."""
    flip, heads, merge = ((1,), (0,)), ((1, 2), (0,)), ((2,), (0, 1))
    rows = [("embed/table", "embed_tokens.weight", ((0,), (1,)))]
    for x, axes, bias in (
        ("q", heads, cfg.qkv_bias),
        ("k", heads, cfg.qkv_bias),
        ("v", heads, cfg.qkv_bias),
        ("o", merge, cfg.o_bias),
    ):
        rows.append((f"layers/attn/{x}/kernel", f"layers.{{}}.self_attn.{x}_proj.weight", axes))
        if bias:
            flat = ((0,),) if x == "o" else ((0, 1),)
            rows.append((f"layers/attn/{x}/bias", f"layers.{{}}.self_attn.{x}_proj.bias", flat))
    for x in ("gate", "up", "down"):
        rows.append((f"layers/mlp/{x}/kernel", f"layers.{{}}.mlp.{x}_proj.weight", flip))
        if cfg.mlp_bias:
            rows.append((f"layers/mlp/{x}/bias", f"layers.{{}}.mlp.{x}_proj.bias", ((0,),)))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if cfg.post_norms:
        norms |= {
            "post_attn_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    if cfg.qk_norm:
        norms |= {"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}
    rows += [(f"layers/{a}/scale", f"layers.{{}}.{b}.weight", ((0,),)) for a, b in norms.items()]
    rows.append(("final_norm/scale", "norm.weight", ((0,),)))
    if cfg.head == "value":
        rows.append(("value/kernel", "/score.weight", flip))
    elif not cfg.tie:
        rows.append(("unembed/kernel", "/lm_head.weight", flip))
    return tuple(Tensor(*row) for row in rows)


# --- reading


@dataclasses.dataclass(frozen=True)
class _Files:
    """The tensors of a directory, by name: a safetensors slice that reads on indexing."""

    directory: Path
    slices: dict[str, Any]
    prefix: str

    def name(self, tensor: Tensor, layer: int | None = None) -> str:
        if tensor.name.startswith("/"):
            outer = "language_model." if self.prefix == "language_model.model." else ""
            return outer + tensor.name[1:]
        return self.prefix + tensor.name.format(layer)


def load_hf(
    directory: str | PathLike[str],
    cfg: LMConfig,
    shardings: Any = None,
    *,
    dtype: str | None = None,
    value_std: float = 0.0,
) -> PyTree:
    """Reads a checkpoint into parameters placed as asked.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and its files.
        cfg: what the directory's `config.json` says, with the `head` that is wanted.
        shardings: of each parameter, or one for all; None: uncommitted, on the default device.
        dtype: of the parameters; None: `cfg.param_dtype`. The files may be f32, bf16 or f16.
        value_std: for `head="value"` where the directory holds no value head: standard deviation
            of the normal distribution its weights are drawn from. With 0 every value is 0.

    Returns:
        The parameters of `params.abstract(cfg)`. In several processes, each reads its own part.

    Raises:
        FileNotFoundError: no safetensors files, or one that the index names is missing.
        ValueError: a missing, extra or misshapen tensor, or one of another dtype; a damaged file.
    """
    dtype = cfg.param_dtype if dtype is None else str(jnp.dtype(dtype))
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}, but it should be one of {', '.join(DTYPES)}.")
    shapes = lm_params.abstract(cfg)
    table = {tensor.path: tensor for tensor in tensors(cfg)}
    if set(table) != set(tree.names(shapes)):
        raise AssertionError(f"{set(table) ^ set(tree.names(shapes))} in only one of the tables")
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: _Given(shardings), shapes)
    else:
        shardings = jax.tree.map(lambda _, s: _Given(s), shapes, shardings)
    with ExitStack() as stack:
        files = _open(Path(directory), stack)
        table = _with_value_head(table, files)
        _check(files, table, shapes, cfg)

        def leaf(path: str, like: jax.ShapeDtypeStruct, given: _Given) -> Array:
            if path not in table:
                return _place(like.shape, dtype, given.sharding, _drawn(like.shape, value_std))
            read = _reader(files, table[path], like.shape, jnp.dtype(dtype))
            return _place(like.shape, dtype, given.sharding, read)

        return tree.map_with_name(leaf, shapes, shardings)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A sharding as a leaf: shardings are leaves, but None is not."""

    sharding: Any


def _open(directory: Path, stack: ExitStack) -> _Files:
    from safetensors import SafetensorError, safe_open

    slices: dict[str, Any] = {}
    for path in _paths(directory):
        try:
            file = stack.enter_context(safe_open(str(path), framework="np"))
            slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
    prefixes = [p for p in _PREFIXES if f"{p}embed_tokens.weight" in slices]
    if not prefixes:
        some = ", ".join(sorted(slices)[:5])
        raise ValueError(f"{directory} has no tensor 'model.embed_tokens.weight'; it has {some}...")
    return _Files(directory, slices, prefixes[0])


def _paths(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}.")
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (directory / name).is_file():
                raise FileNotFoundError(f"{index} names {name!r}, which is not in {directory}.")
        return [directory / name for name in names]
    if single.exists():
        return [single]
    there = sorted(p.name for p in directory.iterdir())
    if pickled := [n for n in there if re.fullmatch(r".*\.(bin|pt|pth|ckpt)", n)]:
        raise FileNotFoundError(
            f"{directory} holds only pickled weights ({pickled[0]}), which run code when read; "
            "convert them to safetensors."
        )
    raise FileNotFoundError(
        f"there is no model.safetensors or model.safetensors.index.json in {directory}; "
        f"it holds {there[:8]}."
    )


def _with_value_head(table: dict[str, Tensor], files: _Files) -> dict[str, Tensor]:
    """The table with the name that the directory gives its value head, or without one."""
    if "value/kernel" not in table:
        return table
    found = [name for name in _VALUE_NAMES if name in files.slices]
    table = dict(table)
    head = table.pop("value/kernel")
    return (
        table | {"value/kernel": dataclasses.replace(head, name="/" + found[0])} if found else table
    )


def _check(files: _Files, table: dict[str, Tensor], shapes: PyTree, cfg: LMConfig) -> None:
    """Compares what is there with what the model needs, before anything is read."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, like in jax.tree_util.tree_leaves_with_path(shapes):
        if (tensor := table.get(tree.path_name(path))) is None:
            continue
        inner = like.shape[1:] if tensor.stacked else like.shape
        for layer in range(like.shape[0]) if tensor.stacked else (None,):
            expected[files.name(tensor, layer)] = tensor.shape(inner)
    if missing := [name for name in expected if name not in files.slices]:
        raise ValueError(f"{files.directory} has no tensor {_some(missing)}.")
    if extra := [n for n in files.slices if n not in expected and not _ignored(n, files, cfg)]:
        raise ValueError(
            f"{files.directory} has the tensor {_some(extra)}, which {cfg.family} of this "
            f"configuration (head={cfg.head!r}) does not have."
        )
    for name, shape in expected.items():
        there = tuple(files.slices[name].get_shape())
        if there != shape:
            raise ValueError(f"{name!r} is {list(there)}, but it should be {list(shape)}.")
        code = files.slices[name].get_dtype()
        if code not in _CODES:
            raise ValueError(f"{name!r} is {code}, but it should be one of {', '.join(_CODES)}.")


def _ignored(name: str, files: _Files, cfg: LMConfig) -> bool:
    if name == files.name(Tensor("", "/lm_head.weight", ())):
        return cfg.tie or cfg.head == "value"
    images = files.prefix in ("language_model.model.", "model.language_model.")
    return bool(_BUFFERS.fullmatch(name) or (images and _IMAGES.fullmatch(name)))


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _reader(files: _Files, tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """A function from an index of the parameter to that block of it."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        spans = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        block = np.empty([len(span) for span in spans], dtype)
        if not tensor.stacked:
            block[...] = _slice(files.slices[files.name(tensor)], tensor, shape, spans)
            return block
        for i, layer in enumerate(spans[0]):
            stored = files.slices[files.name(tensor, layer)]
            block[i] = _slice(stored, tensor, shape[1:], spans[1:])
        return block

    return read


def _slice(stored: Any, tensor: Tensor, shape: tuple[int, ...], spans: list[range]) -> np.ndarray:
    """Part of a tensor, with the parameter's axes.

    Of each folded group of axes, only the first can be cut in the file; the others are cut after.
    """
    cuts, unfolded = [], []
    for group in tensor.axes:
        first, rest = spans[group[0]], [shape[a] for a in group[1:]]
        cuts.append(slice(first.start * math.prod(rest), first.stop * math.prod(rest)))
        unfolded += [len(first), *rest]
    data = stored[tuple(cuts)].reshape(unfolded)
    order = [axis for group in tensor.axes for axis in group]
    data = data.transpose(np.argsort(order))
    firsts = {group[0] for group in tensor.axes}
    keep = (slice(None) if a in firsts else slice(s.start, s.stop) for a, s in enumerate(spans))
    return data[tuple(keep)]


def _drawn(shape: tuple[int, ...], std: float) -> Any:
    """A reader of normally distributed numbers, the same in every process."""
    values = std * np.random.default_rng(0).standard_normal(shape, np.float32)
    return lambda index: values[index]


def _place(shape: tuple[int, ...], dtype: str, sharding: Any, read: Any) -> Array:
    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)), dtype)
    blocks: dict[tuple[Any, ...], np.ndarray] = {}

    def once(index: tuple[slice, ...]) -> np.ndarray:
        # Replicas ask for the same block; read it once.
        key = tuple((s.start, s.stop) for s in index)
        if key not in blocks:
            blocks[key] = np.asarray(read(index), jnp.dtype(dtype))
        return blocks[key]

    return jax.make_array_from_callback(shape, sharding, once)


# --- writing


def save_hf(
    directory: str | PathLike[str],
    cfg: LMConfig,
    params: PyTree,
    *,
    tokenizer_from: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers (and `load_hf`) read.

    Holds `config.json`, `generation_config.json`, the weights in the dtype they have, and the
    tokenizer. `head="value"` is written as a sequence classifier with one label, its head as
    `score.weight`. The directory appears whole or not at all; one that this function wrote earlier
    is replaced. In several processes all must call it; process 0 writes.

    Args:
        directory: to write.
        cfg: of the model.
        params: as `params.abstract(cfg)`, sharded in any way.
        tokenizer_from: a directory whose tokenizer files and generation settings are copied, or a
            tokenizer with `save(directory)`; None: none.
        shard_bytes: no file of weights is larger, unless one tensor is.

    Raises:
        FileExistsError: the directory holds something that this function does not write.
        ValueError: the family's format cannot say what `cfg` says; parameters of another shape.
    """
    directory = Path(directory)
    leaves = {tree.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for path, like in jax.tree_util.tree_leaves_with_path(lm_params.abstract(cfg)):
        name = tree.path_name(path)
        if name not in leaves or leaves[name].shape != like.shape:
            there = list(leaves[name].shape) if name in leaves else "missing"
            raise ValueError(f"parameter {name!r} is {there}, but it should be {list(like.shape)}.")
    raw = config_to_hf(cfg.replace(param_dtype=str(leaves["embed/table"].dtype)))
    _refuse_foreign(directory)
    writer = jax.process_index() == 0
    partial = directory.with_name(f".{directory.name}.partial")
    if writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_texts(partial, cfg, raw, tokenizer_from)
    _write_weights(partial if writer else None, list(_pieces(cfg, leaves)), leaves, shard_bytes)
    if writer:
        _swap(partial, directory)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"save_hf {directory}")


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists():
        return
    foreign = [p.name for p in directory.iterdir() if not _EXPORTED.fullmatch(p.name)]
    if foreign:
        raise FileExistsError(f"{directory} holds {sorted(foreign)[0]!r}; it would be lost.")


def _swap(partial: Path, directory: Path) -> None:
    if not directory.exists():
        partial.rename(directory)
        return
    previous = directory.with_name(f".{directory.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    directory.rename(previous)
    partial.rename(directory)
    shutil.rmtree(previous)


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
            generation = read_json(source / "generation_config.json")
    ids = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation |= {k: v for k, v in ids.items() if v is not None}
    for name, value in (("config.json", raw), ("generation_config.json", generation)):
        (to / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One tensor to be written."""

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
            name = (
                tensor.name[1:] if tensor.name[0] == "/" else "model." + tensor.name.format(layer)
            )
            yield _Piece(name, tensor, layer, tensor.shape(inner), jnp.dtype(leaf.dtype))


def _write_weights(
    to: Path | None, pieces: list[_Piece], leaves: dict[str, Array], shard_bytes: int
) -> None:
    """Writes the files and their index; `to=None` only takes part in the gathering."""
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
                array = _gather(leaves[piece.tensor.path], piece.layer, fetch=file is not None)
                if file:
                    order = [axis for group in piece.tensor.axes for axis in group]
                    stored = array.transpose(order).reshape(piece.shape)
                    file.write(np.ascontiguousarray(stored).tobytes())
    if to and len(files) > 1:
        index = {
            "metadata": {"total_size": sum(p.nbytes for p in pieces)},
            "weight_map": {p.name: n for n, ps in zip(names, files, strict=True) for p in ps},
        }
        path = to / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(pieces: list[_Piece]) -> bytes:
    """The start of a safetensors file: its length in 8 bytes, then JSON, padded to 8 bytes."""
    codes = {dtype: code for code, dtype in _CODES.items()}
    # transformers refuses files that do not say which framework's layout they have.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in pieces:
        if str(piece.dtype) not in codes:
            raise ValueError(f"{piece.name!r} is {piece.dtype}; it should be one of {list(codes)}.")
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


def _gather(leaf: Array, layer: int | None, *, fetch: bool) -> np.ndarray | None:
    """One layer of a parameter (or all of one without layers), whole, on this host."""
    if jax.process_count() > 1:
        # Every process takes part, so that the one that writes can see the others' shards.
        leaf = _whole(leaf.sharding.mesh)(leaf, layer).addressable_data(0)
    elif layer is not None:
        leaf = _whole(None)(leaf, layer)
    return np.asarray(leaf) if fetch else None


@lru_cache(maxsize=8)
def _whole(mesh: jax.sharding.Mesh | None) -> Any:
    """Takes one layer (`None`: all of a parameter without layers), replicated over the mesh."""

    def take(leaf: Array, layer: Array | None) -> Array:
        if layer is None:
            return leaf
        return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)

    if mesh is None:
        return jax.jit(take)
    return jax.jit(
        take, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
