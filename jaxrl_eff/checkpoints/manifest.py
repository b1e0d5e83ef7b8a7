"""Files of a checkpoint on disk: their names, their manifest, and the arrays they hold.

A name belongs to this package only in the exact form in which it is written, and a directory with
such a name only if it has no other files. Everything else in the checkpoint folder is left alone.

The manifest has the size and CRC-32 of every file, so it detects changes after a checkpoint was
made. Its own index shows that it was complete then: every array in the record must be there with
its shape and dtype, and all its chunks must be within existing files.
"""

import itertools
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrl_eff import files

SAVING, DELETING = "saving-", "deleting-"
PARTS = ("state", "still")
_CONTENT = re.compile(
    r"(record|manifest|noted)\.json|\.(record|manifest|noted)\.json\.partial|(state|still).*"
)
# At most nine digits, so that processes can exchange a step in 32 bits.
_NAME = re.compile(rf"({SAVING}|{DELETING}|)([0-9]{{8,9}})")


def name(step: int, kind: str = "") -> str:
    """Returns the directory of a checkpoint; with SAVING or DELETING, of one in transition."""
    return f"{kind}{step:08d}"


def steps(folder: Path, kind: str = "") -> list[int]:
    """Returns steps of directories whose names match `name(step, kind)`, newest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and match[1] == kind and name(int(match[2]), kind) == path.name:
            found.append(int(match[2]))
    return sorted(found, reverse=True)


def ours(path: Path) -> bool:
    """Returns True if this is a directory that has only parts of a checkpoint."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(_CONTENT.fullmatch(p.name) for p in path.iterdir())


def make_room(path: Path) -> Path | None:
    """Frees a name: deletes our own directory; renames anything else and returns the new name."""
    if not path.exists() and not path.is_symlink():
        return None
    if ours(path):
        files.remove(path)
        return None
    aside = next(
        p
        for n in itertools.count(1)
        if not (p := path.with_name(f"{path.name}.aside-{n}")).exists() and not p.is_symlink()
    )
    path.rename(aside)
    return aside


def clear(directory: Path, *kinds: str) -> None:
    """Removes what killed saves or deletions have left in a directory of checkpoints."""
    for kind in kinds:
        for step in steps(directory, kind):
            rest = directory / name(step, kind)
            if ours(rest):
                files.remove(rest)


def foreign(path: Path, fingerprints: tuple[str, ...] | None) -> str | None:
    """Returns why a checkpoint is not of the run with these fingerprints, or None.

    `fingerprints=None` accepts any.
    """
    try:
        theirs = read(path / "record.json")["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its record.json cannot be read"
    if fingerprints is not None and theirs not in fingerprints:
        mine = fingerprints[0]
        return f"it belongs to another run (fingerprint {theirs!r}; this run's is {mine!r})"
    return None


def marks(path: Path) -> dict[str, tuple[int, int]]:
    """Returns size and modification time of every file below a directory; a write alters them."""
    found = [(p, p.stat()) for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): (s.st_size, s.st_mtime_ns) for p, s in found}


def damage(path: Path) -> str | None:
    """Returns the first mismatch of a checkpoint with its manifest or its record, or None."""
    if path.is_symlink() or not path.is_dir():
        return "it is no directory of its own"
    try:
        table = read(path / "manifest.json")
        manifest = {name: (int(size), int(total)) for name, (size, total) in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return "its manifest.json is missing or damaged"
    if "record.json" not in manifest:
        return "its manifest.json names no record.json"
    for name, (size, _) in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (actual := (path / name).stat().st_size) != size:
            return f"{name} has {actual} bytes and should have {size}"
    with ThreadPoolExecutor(4) as pool:  # crc32 releases the GIL
        sums = pool.map(lambda name: crc(path / name), manifest)
        for (name, (_, total)), actual in zip(manifest.items(), sums, strict=True):
            if actual != total:
                return f"{name} does not match its checksum"
    return lacking(path)


def lacking(path: Path) -> str | None:
    """Returns the first array of the record that the files lack, or None.

    Reads only indexes, so its time does not depend on the size of the arrays.
    """
    try:
        record = read(path / "record.json")
        leaves = {name: (tuple(shape), dtype) for name, (shape, dtype) in record["leaves"].items()}
        still = set(record.get("still", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its record.json cannot be read"
    stored = {name: v for name, v in leaves.items() if math.prod(v[0])}
    for part in PARTS:
        mine = {name: v for name, v in stored.items() if (name in still) == (part == "still")}
        if not mine:
            continue
        try:
            reason = _lacking(path / part, mine)
        except Exception as error:  # tensorstore raises many types
            reason = f"cannot be read: {first_line(error)}"
        if reason:
            return f"{part} {reason}"
    return None


def first_line(error: BaseException) -> str:
    """Returns an error in one line, without the source locations that libraries append."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).split(" [source locations=")[0]


def _lacking(part: Path, leaves: dict[str, tuple[tuple[int, ...], str]]) -> str | None:
    for about in (part / "_sharding", part / "_CHECKPOINT_METADATA", *part.glob("array_meta*/*")):
        if about.is_file():  # not needed, but orbax fails on a truncated one
            read(about)
    tree = read(part / "_METADATA")["tree_metadata"].values()
    if absent := sorted(set(leaves) - {entry["key_metadata"][-1]["key"] for entry in tree}):
        return f"does not name {few(absent)}"
    with files.plainly(part) as way:
        entries = dict(_entries(way))
    for name, (shape, dtype) in leaves.items():
        about = entries.get(f"{name}/.zarray")
        if about is None:
            return f"lacks {name}"
        if not isinstance(about, bytes):
            return f"has the description of {name} elsewhere"
        known = json.loads(about)
        kind = jnp.dtype(dtype)
        if tuple(known["shape"]) != shape or known["dtype"] not in (kind.str, kind.name):
            return f"holds {name} as {known['dtype']}{known['shape']}, not {dtype}{list(shape)}"
        for key in _pieces(name, known):
            if key not in entries:
                return f"lacks the piece {key}"
    for key, where in entries.items():
        if isinstance(where, tuple) and not _holds(part, *where):
            return f"lacks the bytes of {key}, which should be in {where[0]}"
    return None


def _pieces(name: str, about: dict[str, Any]) -> Iterator[str]:
    """Yields the keys of an array's chunks in zarr's format."""
    counts = [-(-n // c) for n, c in zip(about["shape"], about["chunks"], strict=True)]
    for index in itertools.product(*map(range, counts)):
        yield f"{name}/{about['dimension_separator'].join(map(str, index)) or '0'}"


def _entries(way: Path) -> Iterator[tuple[str, bytes | tuple[str, int, int]]]:
    """Yields (key, value or (file, first byte, bytes)) for all entries of an OCDBT database."""
    import tensorstore as ts

    base = ts.KvStore.open({"driver": "file", "path": f"{way}/"}).result()
    newest = ts.ocdbt.dump(base).result()["versions"][-1]["root"]
    below = [(b"", newest["location"])]
    while below:
        prefix, location = below.pop()
        node = ts.ocdbt.dump(base, location).result()
        for entry in node["entries"]:
            if "location" in entry:
                below.append((prefix + entry["subtree_common_prefix"], entry["location"]))
            elif "inline_value" in entry:
                yield (prefix + entry["key"]).decode(), entry["inline_value"]
            else:
                _, base_path, name, start, size = entry["indirect_value"].split(":")
                yield (prefix + entry["key"]).decode(), (base_path + name, int(start), int(size))


def _holds(part: Path, name: str, start: int, size: int) -> bool:
    path = part / name
    return path.is_file() and path.stat().st_size >= start + size


def few(names: Iterable[str]) -> str:
    """Joins the first few names."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def crc(path: Path) -> int:
    """Computes the CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return total


def meta(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's record.json with later notes; a damaged note is ignored."""
    known = read(path / "record.json")
    try:
        noted = read(path / "noted.json")
        return {**known, **noted, "record": {**known["record"], **noted["record"]}}
    except (OSError, ValueError, TypeError, KeyError):
        return known


def write(path: Path, value: Any) -> None:
    """Writes JSON durably: returns once it is on disk."""
    files.write(path, json.dumps(value, allow_nan=False), durable=True)


def read(path: Path) -> Any:
    """Reads JSON.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None
