r"""Shows how batches of short and long sequences divide over a mesh, and what that gains.

  python -m jaxrl_eff balance --lengths=lengths.txt --mesh=data4,seq8 \
      --model=qwen2.5-0.5b --hardware=h100 --page=balance.html

Short sequences stay whole on one rank; long ones are cut over the `seq` axis. --lengths is a file
with the length of every example: an integer or a JSON object with "length" a line, or one JSON list
of integers. It is cut into batches in its order; the last one may be smaller. Nothing is run:
seconds are estimates of a cost model, the same for all rules that are compared. "skrull" is the
rule that training uses, with the shapes that are printed; "exact" is the same rule without a limit
on shapes, and the other rules have none either.

Exit codes: 0 scheduled; 2 the command cannot be done.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_eff.cli import parser
from jaxrl_eff.cli.pages import balance_page
from jaxrl_eff.data.balance.baselines import Study, study
from jaxrl_eff.data.balance.cost import Cost
from jaxrl_eff.models import LMConfig
from jaxrl_eff.planner import clusters as known
from jaxrl_eff.planner import packed_rows
from jaxrl_eff.train.console import Console, number

AXES = ("data", "fsdp", "seq", "tensor")
ROOM = 26_000
# Their config.json: layers, width, heads, kv_heads, head_dim, ffn, vocab.
_SIZES = {
    "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864, 151_936),
    "qwen2.5-1.5b": (28, 1536, 12, 2, 128, 8960, 151_936),
    "qwen2.5-3b": (36, 2048, 16, 2, 128, 11_008, 151_936),
    "qwen2.5-7b": (28, 3584, 28, 4, 128, 18_944, 152_064),
    "qwen2.5-14b": (48, 5120, 40, 8, 128, 13_824, 152_064),
    "qwen2.5-32b": (64, 5120, 40, 8, 128, 27_648, 152_064),
    "llama3-1b": (16, 2048, 32, 8, 64, 8192, 128_256),
    "llama3-3b": (28, 3072, 24, 8, 128, 8192, 128_256),
    "llama3-8b": (32, 4096, 32, 8, 128, 14_336, 128_256),
    "llama3-70b": (80, 8192, 64, 8, 128, 28_672, 128_256),
}
MODELS = {
    name: LMConfig(
        layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn,
        vocab=vocab,
    )
    for name, (layers, width, heads, kv_heads, head_dim, ffn, vocab) in _SIZES.items()
}  # fmt: skip


def read_lengths(path: str | Path) -> np.ndarray:
    """int64 [n]: the lengths in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is no integer of at least 1, by its line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--lengths={path} is not a file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}.") from error
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON list: {error}.") from error
        found = [_length(path, f"item {i}", x) for i, x in enumerate(items)]
    else:
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), start=1)]
        found = [_length(path, f"line {i}", _value(line)) for i, line in lines if line]
    if not found:
        raise ValueError(f"{path} holds no lengths.")
    return np.array(found, np.int64)


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _length(path: Path, where: str, value: Any) -> int:
    given = value.get("length") if isinstance(value, dict) else value
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ValueError(
            f"{path}, {where}: {str(value)[:60]!r} is not a length, an integer of at least 1."
        )
    return given


def read_mesh(text: str) -> dict[str, int]:
    """`data4,seq8` as sizes by axis, 1 where an axis is not named.

    Raises:
        ValueError: a word that is no axis and size, or an axis twice.
    """
    out: dict[str, int] = {}
    for word in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)=?([1-9]\d*)\s*", word)
        if match is None or match[1] not in AXES:
            raise ValueError(
                f"--mesh={text}: unknown axis {word!r}; expected one of {list(AXES)}, each with "
                "its size, e.g. data4,seq8."
            )
        if match[1] in out:
            raise ValueError(f"--mesh={text}: the axis {match[1]!r} is given twice.")
        out[match[1]] = int(match[2])
    return {axis: out.get(axis, 1) for axis in AXES}


def read_model(text: str) -> LMConfig:
    """A model by name, or of a directory with a config.json.

    Raises:
        ValueError: neither.
    """
    if text.lower() in MODELS:
        return MODELS[text.lower()]
    if (Path(text) / "config.json").is_file():
        from jaxrl_eff.checkpoints.hf_config import read_config

        return read_config(text)
    raise ValueError(
        f"--model: unknown model {text!r}; expected one of {list(MODELS)}, or a directory with a "
        "config.json."
    )


def cost_on(hardware: str, mesh: dict[str, int], model: LMConfig) -> Cost:
    """The cost on a mesh of this hardware, in 16 bits, see `packed_rows.cost_on`.

    Raises:
        ValueError: unknown hardware, or more devices than there are.
    """
    names = _hardware()
    if hardware.lower() not in names:
        raise ValueError(f"--hardware: unknown hardware {hardware!r}; expected one of {names}.")
    devices = int(np.prod(list(mesh.values())))
    if hardware.lower() in ("v4", "v5e", "v5p", "v6e"):
        cluster = known.parse(f"{hardware}:{devices}")
    else:
        per_host = min(8, devices)
        cluster = known.parse(f"{hardware}:{-(-devices // per_host)}x{per_host}")
    half = model.replace(dtype="bfloat16")
    return packed_rows.cost_on(cluster, half, seq=mesh["seq"], tensor=mesh["tensor"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed on a device
    words = parser.command("balance", __doc__)
    add = words.option
    add("--lengths", "FILE", "tokens of every example")
    add("--mesh", "AXES", "sizes of the axes, e.g. data4,seq8")
    add("--model", "NAME", f"a directory with a config.json, or one of {', '.join(MODELS)}")
    add("--hardware", "NAME", f"one of {', '.join(_hardware())}")
    room = "tokens that fit in a rank's memory; of 0.5B parameters in 80 GB"
    add("--room", "TOKENS", room, parser.COUNT, ROOM)
    add("--batch", "N", "examples of a global batch", parser.COUNT, 256)
    add("--shapes", "N", "most shapes to compile; 0: no limit", parser.number(int, 0), 12)
    add("--page", "FILE.html", parser.PAGE, default=None)
    return words.run(argv, _run)


def _hardware() -> list[str]:
    return [name for name in known.NAMES if name != "local"]


def _run(options: argparse.Namespace) -> None:
    mesh, model = read_mesh(options.mesh), read_model(options.model)
    cost = cost_on(options.hardware, mesh, model)
    found = study(
        read_lengths(options.lengths),
        groups=mesh["data"] * mesh["fsdp"],
        parts=mesh["seq"],
        capacity=options.room,
        cost=cost,
        batch=options.batch,
        shapes=options.shapes,
    )
    title, told = f"Schedule of {Path(options.lengths).name}", facts(found, options)
    _print(title, told, found)
    if options.page:
        parser.write_page(options.page, balance_page.page(title, told, found))


def facts(found: Study, options: argparse.Namespace) -> dict[str, str]:
    """Returns the given arguments in words."""
    lengths = np.concatenate([s.lengths for s in found.schedules])
    middle, most = np.percentile(lengths, [50, 99]).tolist()
    batches = f"{len(found.schedules)} batch{'es' * (len(found.schedules) > 1)}"
    axes = [f"{axis} {n}" for axis, n in read_mesh(options.mesh).items() if n > 1]
    shapes = ", ".join(f"{s.local}+{s.distributed}" for s in found.shapes or ())
    return {
        "lengths": (
            f"{len(lengths):,} in {batches}; median {middle:,.0f}, 99 % below {most:,.0f}, longest "
            f"{lengths.max():,}"
        ),
        "mesh": f"{', '.join(axes) or 'one device'}; {options.room:,} tokens a rank",
        "model": f"{options.model} on {options.hardware}",
        "shapes": shapes or "exact",
    }


def _print(title: str, told: dict[str, str], found: Study) -> None:
    first = found.schedules[0]
    seconds = first.rank_seconds().reshape(len(first.shapes), -1).max(1)
    here = [first.step == j for j in range(len(first.shapes))]
    columns = "micro-step", "local columns", "distributed", "sequences", "of them local", "seconds"
    rows = [
        (j, *shape, int(at.sum()), int((first.rank[at] >= 0).sum()), number(float(s)))
        for j, (shape, at, s) in enumerate(zip(first.shapes, here, seconds, strict=True))
    ]
    console = Console(terminal=False)
    console.header(title, told)
    console.table(
        "estimated, all batches", balance_page.COLUMNS, balance_page.table(found, times="x")
    )
    console.table(f"the first batch: {first.rule}", columns, rows)
