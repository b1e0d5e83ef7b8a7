"""Loading of Hugging Face checkpoints into parameters, one slice at a time.

Every shard of the target sharding reads only the bytes it needs, so neither a host nor a device
ever holds the whole model. `hf_names` maps tensors to parameters, `hf_config` reads the
configuration, `hf_save` writes checkpoints.

Not supported: pickled checkpoints (`.bin`, `.pt`), which run code when read; quantized tensors.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from contextlib import ExitStack
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import fields, tree
from jaxrl_eff.checkpoints.hf_names import CODES, Tensor, tensors
from jaxrl_eff.models import params as lm_params
from jaxrl_eff.models.config import DTYPES, LMConfig
from jaxrl_eff.types import Array, PyTree

_VALUE_NAMES = ("score.weight", "v_head.weight", "v_head.summary.weight", "value_head.weight")
# Prefixes of the decoder: alone, within an image-text model (two spellings), without prefix.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
_ROWS = 16_384  # of a table, compared at a time
_BUFFERS = re.compile(r".*rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class _Files:
    """The tensors of a directory, by name: safetensors slices that are read on indexing."""

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
    keep: Callable[[str, Array], dict[str, Array]] | None = None,
    ignore: Collection[str] = (),
) -> PyTree:
    """Loads a checkpoint into parameters with the given shardings.

    Args:
        directory: has `model.safetensors`, or `model.safetensors.index.json` and its files.
        cfg: configuration from the directory's `config.json`, with the desired `head`.
        shardings: of each parameter, or one for all; None: uncommitted, on the default device.
        dtype: of the parameters; None: `cfg.param_dtype`. The files can be f32, bf16 or f16.
        value_std: for `head="value"` if the directory has no value head: standard deviation of the
            normal distribution of its initial weights. With 0 every value is 0.
        keep: name, parameter -> the arrays to keep of it, by name. Applied to each parameter as
            soon as it is read, so that at most one whole parameter exists at a time; None: keep it.
        ignore: names of files and tensors to skip; in a tensor's name `*` matches anything.

    Returns:
        The parameters of `params.abstract(cfg)`, or the arrays that `keep` returned. With several
        processes, each reads its own part.

    Raises:
        FileNotFoundError: there are no safetensors files, or a file in the index is missing.
        ValueError: a tensor is missing, unexpected, or has a wrong shape or dtype; a file is
            damaged; two files could both be the model; a tied head differs from the table.

    Example:
        >>> from jaxrl_eff import LMConfig, init, load_hf, read_config, save_hf
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> save_hf("loaded", lm, init(lm, jax.random.key(0)))
        >>> load_hf("loaded", read_config("loaded"))["embed"]["table"].shape
        (8, 4)
    """
    dtype = cfg.param_dtype if dtype is None else str(jnp.dtype(dtype))
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; expected one of {[*DTYPES]}.")
    shapes = lm_params.abstract(cfg)
    table = {tensor.path: tensor for tensor in tensors(cfg)}
    if set(table) != set(tree.names(shapes)):
        raise AssertionError(f"{set(table) ^ set(tree.names(shapes))} in only one of the tables")
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: _Given(shardings), shapes)
    else:
        shardings = jax.tree.map(lambda _, s: _Given(s), shapes, shardings)
    with ExitStack() as stack:
        files = _open(Path(directory), stack, ignore)
        table = _with_value_head(table, files)
        _check(files, table, shapes, cfg)

        def leaf(path: str, like: jax.ShapeDtypeStruct, given: _Given) -> Array:
            if path not in table:
                return _place(like.shape, dtype, given.sharding, _drawn(like.shape, value_std))
            read = _reader(files, table[path], like.shape, jnp.dtype(dtype))
            return _place(like.shape, dtype, given.sharding, read)

        if keep is None:
            return tree.map_with_name(leaf, shapes, shardings)
        kept, given = {}, tree.flat(shardings)
        for name, like in tree.flat(shapes).items():
            kept |= keep(name, leaf(name, like, given[name]))
        return tree.with_leaves({}, kept)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A sharding wrapped as a pytree leaf, since None is not a leaf."""

    sharding: Any


def check_weights(
    directory: str | PathLike[str], cfg: LMConfig, *, ignore: Collection[str] = ()
) -> None:
    """Compares the tensors of a directory with those that a model needs; reads almost no data.

    Names, shapes and dtypes come from the files' headers. Only a head that is stored in addition to
    the table it is tied to is read, since the two must be equal.

    Args:
        cfg, ignore: as for `load_hf`.

    Raises:
        FileNotFoundError, ValueError: see `load_hf`.
    """
    with ExitStack() as stack:
        files = _open(Path(directory), stack, ignore)
        table = _with_value_head({tensor.path: tensor for tensor in tensors(cfg)}, files)
        _check(files, table, lm_params.abstract(cfg), cfg)


def _open(directory: Path, stack: ExitStack, ignore: Collection[str]) -> _Files:
    from safetensors import SafetensorError, safe_open

    slices: dict[str, Any] = {}
    home: dict[str, Path] = {}
    for path in weight_files(directory, ignore=ignore):
        try:
            file = stack.enter_context(safe_open(str(path), framework="np"))
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        if twice := sorted(set(found) & set(slices)):
            raise ValueError(f"{twice[0]!r} is in both {home[twice[0]]} and {path}.")
        home |= dict.fromkeys(found, path)
        slices |= found
    slices = {k: v for k, v in slices.items() if not any(fnmatchcase(k, i) for i in ignore)}
    prefixes = [p for p in _PREFIXES if f"{p}embed_tokens.weight" in slices]
    if not prefixes:
        some = ", ".join(sorted(slices)[:5])
        raise ValueError(f"{directory} has no tensor 'model.embed_tokens.weight'; it has {some}...")
    return _Files(directory, slices, prefixes[0])


def weight_files(directory: Path, *, ignore: Collection[str] = ()) -> list[Path]:
    """Returns the safetensors files of a checkpoint; see `load_hf` for the errors raised.

    transformers reads `model.safetensors` even if there is an index, so the two must not differ.
    Other files are ignored.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}.")
    adapter = directory / "adapter_config.json"
    if adapter.exists() and adapter.name not in ignore:
        raise ValueError(
            f"{directory} holds {adapter.name} beside the model, and transformers would add that "
            f"adapter to it; keep them apart, or ignore=({adapter.name!r},) reads the model alone."
        )
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    indexed = _indexed(index) if index.exists() and index.name not in ignore else []
    if single.is_file():
        if indexed and indexed != [single]:
            raise ValueError(
                f"{directory} has {single.name} and {index.name}, which names "
                f"{indexed[0].name!r}: only one of them can be the model."
            )
        return [single]
    if indexed:
        return indexed
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


def _indexed(index: Path) -> list[Path]:
    """Returns the files in an index, which must be in its own directory."""
    weight_map = fields.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map={fields.short(weight_map)}; it should name files.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{index}: weight_map.{tensor}={fields.short(name)}, but it should be a file."
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        # Nothing outside the directory is opened, since the index can be untrusted.
        if Path(name).name != name or not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name!r}, which is not in {index.parent}.")
    return [index.parent / name for name in names]


def _with_value_head(table: dict[str, Tensor], files: _Files) -> dict[str, Tensor]:
    """Returns the table with the directory's name of the value head, or without a value head."""
    if "value/kernel" not in table:
        return table
    found = [name for name in _VALUE_NAMES if name in files.slices]
    table = dict(table)
    head = table.pop("value/kernel")
    return (
        table | {"value/kernel": dataclasses.replace(head, name="/" + found[0])} if found else table
    )


def _check(files: _Files, table: dict[str, Tensor], shapes: PyTree, cfg: LMConfig) -> None:
    """Compares the stored tensors with those the model needs, before any data is read."""
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
            raise ValueError(
                f"{files.directory}: {name!r} is {list(there)}, but it should be {list(shape)}."
            )
        code = files.slices[name].get_dtype()
        if code not in CODES:
            raise ValueError(f"{files.directory}: {name!r} is {code}; expected one of {[*CODES]}.")
    if cfg.tie and cfg.head == "lm":
        _check_tied(files)


def _check_tied(files: _Files) -> None:
    """Rejects a stored head that differs from the table: transformers would not tie the two."""
    head = files.name(Tensor("", "/lm_head.weight", ()))
    table = files.name(Tensor("", "embed_tokens.weight", ()))
    if head not in files.slices:
        return
    a, b = files.slices[head], files.slices[table]
    rows = b.get_shape()[0]
    same = list(a.get_shape()) == list(b.get_shape())
    for start in range(0, rows, _ROWS) if same else ():
        part = slice(start, min(start + _ROWS, rows))  # safetensors rejects slices beyond the end
        same = same and np.array_equal(a[part], b[part])
    if not same:
        raise ValueError(
            f"{files.directory}: tie_word_embeddings is true, but {head!r} is not the same as "
            f"{table!r}. ignore=({head!r},) goes on without it; tie_word_embeddings=false keeps it."
        )


def _ignored(name: str, files: _Files, cfg: LMConfig) -> bool:
    if name == files.name(Tensor("", "/lm_head.weight", ())):
        return cfg.tie or cfg.head == "value"
    images = files.prefix in ("language_model.model.", "model.language_model.")
    return bool(_BUFFERS.fullmatch(name) or (images and _IMAGES.fullmatch(name)))


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _reader(files: _Files, tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """Returns a function from an index of the parameter to that block of it."""

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
    """Reads part of a tensor, with the parameter's axes.

    In each group of flattened axes, only the first can be sliced in the file; the others are sliced
    afterwards.
    """
    cuts, unfolded = [], []
    for group in tensor.axes:
        first, rest = spans[group[0]], [shape[a] for a in group[1:]]
        cuts.append(slice(first.start * math.prod(rest), first.stop * math.prod(rest)))
        unfolded += [len(first), *rest]
    data = stored[tuple(cuts)].reshape(unfolded)
    data = data.transpose(np.argsort(tensor.order))
    firsts = {group[0] for group in tensor.axes}
    keep = (slice(None) if a in firsts else slice(s.start, s.stop) for a, s in enumerate(spans))
    return data[tuple(keep)]


def _drawn(shape: tuple[int, ...], std: float) -> Any:
    """Returns a reader of normally distributed numbers, the same in every process."""
    values = std * np.random.default_rng(0).standard_normal(shape, np.float32)
    return lambda index: values[index]


def _place(shape: tuple[int, ...], dtype: str, sharding: Any, read: Any) -> Array:
    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)), dtype)
    blocks: dict[tuple[Any, ...], np.ndarray] = {}

    def once(index: tuple[slice, ...]) -> np.ndarray:
        # Replicas request the same block; read it once.
        key = tuple((s.start, s.stop) for s in index)
        if key not in blocks:
            blocks[key] = np.asarray(read(index), jnp.dtype(dtype))
        return blocks[key]

    return jax.make_array_from_callback(shape, sharding, once)
