"""Writes docs/config.md, docs/combinations.md, and the tables of names in the pages of the rooms.

`make docs` runs it, and `tests/test_readme.py` checks that all of them are current.
"""

import dataclasses
import importlib
import inspect
import re
import sys
import types
import typing
from pathlib import Path

from jaxrl_eff import schema
from jaxrl_eff.__main__ import COMMANDS
from jaxrl_eff.algorithms import ALGORITHMS
from jaxrl_eff.models import LMConfig, Rope
from jaxrl_eff.peft import AdaptSettings
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.train import settings

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent / "tests"))
# Rooms, and the packages in them whose names stand on the same page.
ROOMS = {
    "core": ("core",),
    "parallel": ("parallel",),
    "models": ("models",),
    "peft": ("peft",),
    "optim": ("optim", "optim.sparse"),
    "rollout": ("rollout", "rollout.rewards"),
    "checkpoints": ("checkpoints", "checkpoints.deltas"),
    "algorithms": ("algorithms",),
    "data": ("data",),
    "planner": ("planner",),
    "train": ("train",),
    "cli": ("cli",),
}
SECTIONS = {
    "config": settings.Run,
    "config.model": settings.ModelSettings,
    "config.checkpoint": settings.CheckpointSettings,
    "config.expect": settings.ExpectSettings,
    "config.STAGE": settings.StageSettings,
    "config.STAGE.data": settings.DataSettings,
    "config.STAGE.optim.ROLE": settings.OptimSettings,
    "config.STAGE.adapt.ROLE": AdaptSettings,
    "config.STAGE.sampling": Sampling,
    "config.STAGE.reward": settings.RewardSettings,
    "config.STAGE.evaluate": settings.EvalSettings,
    "config.STAGE.search": settings.SearchSettings,
    "config.STAGE.sync": settings.SyncSettings,
    "config.STAGE.schedule": settings.ScheduleSettings,
    "config.STAGE.zero": settings.ZeroSettings,
    **{f"config.STAGE.loss of {name}": of.config for name, of in ALGORITHMS.items()},
    "config.model.shape": LMConfig,
    "config.model.rope": Rope,
}
# What constants are; they have no docstring.
CONSTANTS = {
    "ALGORITHMS": "Name in a config -> `Algorithm`.",
    "AXES": "The axes of every mesh, in order.",
    "GRADIENTS": "Names of the selectors that read gradients.",
    "OWN": "Name -> the optimizers that optax does not have.",
    "Plan": "Mapping from calls to placements.",
    "WEIGHTS": "Names of the selectors that read weights alone.",
    "inject_hyperparams": "`optax.inject_hyperparams` with numbers in float32.",
}
HEAD = """\
# Config reference

Written by `make docs` from the dataclasses that a config fills.

A config file returns nested mappings. `STAGE` is a name of `config.stages`, `ROLE` a model that the
stage trains. Any value can be set on the command line: `--config.STAGE.optim.ROLE.lr=1e-5`. Unknown
fields, values of the wrong type and values out of range are errors with their path.
"""


def config_page() -> str:
    """The reference of all sections."""
    return "\n".join([HEAD, *(section(path, cls) for path, cls in SECTIONS.items())])


def section(path: str, cls: type) -> str:
    """One section: its first sentence, a table of fields, and what they mean."""
    summary, attributes = documented(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = ["| field | type | default |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if (cls, field.name) != (settings.Run, "stage"):
            row = f"| `{field.name}` | {kind(hints[field.name])} | {default(field)} |"
            rows.append(row)
    listed = [f"- {names}: {text}" for names, text in attributes if names != "`stage`"]
    return "\n".join([f"## {path}", "", summary, "", *rows, "", *listed, ""])


def documented(cls: type) -> tuple[str, list[tuple[str, str]]]:
    """A docstring's text before its sections, and the entries of "Attributes:"."""
    doc = inspect.getdoc(cls) or ""
    text, _, rest = doc.partition("Attributes:\n")
    entries: list[list[str]] = []
    for line in re.split(r"\n\n?\S", rest)[0].splitlines():
        if re.match(r"    \S", line):
            names, _, about = line.strip().partition(": ")
            entries.append([", ".join(f"`{n}`" for n in names.split(", ")), about])
        elif entries:
            entries[-1][1] += f" {line.strip()}"
    text = re.split(r"\n\n(?:Example|Raises):", text)[0]
    return " ".join(text.split()), [(names, " ".join(about.split())) for names, about in entries]


def kind(hint: typing.Any) -> str:
    """A type as readers know it, with its range."""
    if typing.get_origin(hint) is typing.Annotated:
        inner, *marks = typing.get_args(hint)
        ranges = [str(m) for m in marks if isinstance(m, schema.Within) and not m.infinite]
        pattern = ["a regular expression" for m in marks if isinstance(m, schema.Regex)]
        return ", ".join([kind(inner), *ranges, *pattern])
    if isinstance(hint, types.UnionType):
        return " or ".join(map(kind, typing.get_args(hint)))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"tuple of {kind(args[0])}"
    if origin is dict:
        return "dict" if args[1] is typing.Any else f"dict of {kind(args[1])}"
    if dataclasses.is_dataclass(hint):
        return "a section"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def default(field: dataclasses.Field) -> str:
    """A field's default; sections have their own."""
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, settings.RewardSettings):
        return f"name=`{value.name!r}`"
    return "" if dataclasses.is_dataclass(value) else f"`{value!r}`"


def names_table(package: str) -> str:
    """The commands, or a package's public names with the first sentence of their docstrings."""
    if package == "cli":
        rows = [f"| `{word}` | {what} |" for word, what in COMMANDS.items()]
        return "\n".join(["| command | |", "|---|---|", *rows])
    room = importlib.import_module(f"jaxrl_eff.{package}")
    rows = [f"| `jaxrl_eff.{package}` | |", "|---|---|"]
    for name in sorted(room.__all__, key=str.lower):
        what = CONSTANTS.get(name) or first_line(getattr(room, name))
        rows.append(f"| `{name}` | {what} |")
    return "\n".join(rows)


def first_line(found: typing.Any) -> str:
    """The first sentence of an object's docstring, for a table of Markdown."""
    paragraph = " ".join((inspect.getdoc(found) or "").partition("\n\n")[0].split())
    sentence = re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]
    parts = sentence.replace("|", r"\|").split("`")
    parts[::2] = [text.replace("<", "&lt;") for text in parts[::2]]  # outside of code
    return "`".join(parts)


def room_page(text: str, room: str) -> str:
    """The page of a room with current tables."""
    for package in ROOMS[room]:
        block = f"<!-- names {package} -->\n{names_table(package)}\n<!-- /names {package} -->"
        pattern = rf"<!-- names {package} -->.*?<!-- /names {package} -->"
        text = re.sub(pattern, lambda _, b=block: b, text, flags=re.DOTALL)
    return text


def combinations_page() -> str:
    """The tables of features that go together."""
    return importlib.import_module("combinations").page()


def main() -> None:
    """Rewrites the pages."""
    (DOCS / "config.md").write_text(config_page())
    (DOCS / "combinations.md").write_text(combinations_page())
    for room in ROOMS:
        path = DOCS / f"{room}.md"
        path.write_text(room_page(path.read_text(), room))


if __name__ == "__main__":
    main()
