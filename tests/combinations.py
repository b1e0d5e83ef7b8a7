"""Which features of a stage go together: the data of docs/combinations.md and its tests.

A feature is a change of the configs of tests/tiny.py. `changes` makes one config of an algorithm
and any features; `REASONS` has the pairs that a stage refuses. Needs neither JAX nor the package,
since docs/generate.py reads it.
"""

import itertools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

WHERE, WHAT, RUN = "where", "what", "run"


class Feature(NamedTuple):
    """A row of the table.

    Attributes:
        title: its name there.
        fields: what of a config has it.
        kind: WHERE if it changes only where and how fast a stage computes, WHAT if it changes what
            is computed, RUN if it is of a whole run.
        algorithm: the smallest one that it can be tried with.
    """

    title: str
    fields: str
    kind: str
    algorithm: str = "sft"


class Reason(NamedTuple):
    """Why a pair is refused.

    Attributes:
        text: for the page.
        said: a regular expression of the error; "" if no config can have both.
    """

    text: str
    said: str


FEATURES = {
    "axes": Feature("fsdp and tensor axes", "`plan`: `fsdp=2`, `tensor=2`", WHERE),
    "seq": Feature("sequence axis", "`plan`: `seq=2`", WHERE),
    "meshes": Feature("calls on different devices", "`plan`: a row for each call", WHERE, "grpo"),
    "memory": Feature(
        "microbatches, host memory", "`plan`: `microbatches=2`, `offload` of state and models",
        WHERE,
    ),
    "search": Feature("searched plan", '`plan="search"`', WHERE),
    "skrull": Feature("rows by length", '`schedule.name="skrull"`', WHERE),
    "zero": Feature("nodes, exact", '`zero.name="exact"`', WHERE),
    "lossy": Feature(
        "nodes, few bits", '`zero.name`: `"int8"`, `"int4"`, `"int4_delta"`, `"qgz"`', WHAT
    ),
    "changes": Feature("sync by changes", '`sync.name="changes"`', WHERE, "grpo"),
    "lora": Feature("LoRA", '`adapt`: `"lora"`, `"rslora"`, `"dora"`', WHAT),
    "base": Feature("base in 8 or 4 bits", '`adapt`: `base="int8"`, `"nf4"`', WHAT),
    "sparse": Feature(
        "sparse entries", '`adapt`: `"static"`, `"periodic"`, `"spiel_ag"`, `"spiel_ma"`', WHAT
    ),
    "lisa": Feature("layers in turn", '`adapt`: `"lisa"`', WHAT),
    "narrow": Feature(
        "16-bit weights", "`param_dtype`; `optim`: `store` or `collage_adamw`, `descent`, `frozen`",
        WHAT,
    ),
    "stale": Feature("older weights", "`staleness=1`", WHAT, "grpo"),
    "minibatches": Feature(
        "epochs, minibatches", "`loss`: `epochs=2`, `minibatches=2`", WHAT, "grpo"
    ),
    "run": Feature(
        "evaluation, resume, export", "`evaluate`, `checkpoint`, `export`: a killed run", RUN
    ),
}  # fmt: skip
SAMPLING = ("ppo", "grpo", "rloo", "remax", "raft")
ALGORITHMS = ("sft", "reward_model", "dpo", *SAMPLING)
NAMES = (*FEATURES, *ALGORITHMS)

_PLAN = Reason(
    "Both are values of `plan`: a search chooses the axes, devices and microbatches itself, and a "
    "table says them.",
    "",
)
_ONE_CALL = Reason("The stage has a single call with a model, so nothing can be apart.", "unknown")
_SAMPLES = Reason(
    "Nothing is sampled: no call reads weights of another age, or has to be sent them.",
    "does not sample|staleness is 1",
)
_ONCE = Reason(
    "Rows come from the data and not from a rollout to be used again; a pass over the data is a "
    "matter of `steps`, an update of `batch`.",
    "loss: unknown field 'epochs'",
)
_KERNELS = Reason(
    "LISA trains kernels as a whole, and an adapter leaves them as they are: one kernel would be "
    "trained in two ways.",
    "lisa trains whole kernels",
)
REASONS = {
    **{(name, "search"): _PLAN for name in ("axes", "seq", "meshes", "memory")},
    ("zero", "lossy"): Reason("Both are values of `zero.name`.", ""),
    ("sparse", "lisa"): Reason(
        "Both say which numbers of a kernel are trained, and a kernel has one answer to that: the "
        "value of `adapt.name`.",
        "",
    ),
    ("lora", "lisa"): _KERNELS,
    ("base", "lisa"): Reason(
        "LISA writes into the kernels, and codes of 8 or 4 bits cannot take small changes.",
        "writes into the kernels",
    ),
    **{("meshes", name): _ONE_CALL for name in ("sft", "reward_model")},
    **{(f, name): _SAMPLES for f in ("changes", "stale") for name in ALGORITHMS[:3]},
    **{("minibatches", name): _ONCE for name in ALGORITHMS[:3]},
    ("run", "reward_model"): Reason(
        "A reward model generates nothing that could be evaluated. It is resumed and exported.",
        "trains no model that generates",
    ),
}
# Pairs that the default tests try: every feature, and what shares most code.
FEW = (
    ("axes", "seq"), ("axes", "lora"), ("seq", "skrull"), ("meshes", "changes"),
    ("meshes", "stale"), ("memory", "zero"), ("search", "base"),
    ("search", "run"), ("zero", "base"), ("lossy", "sparse"),
    ("lossy", "narrow"), ("lora", "narrow"), ("lisa", "run"), ("lisa", "minibatches"),
    ("stale", "changes"),
)  # fmt: skip

ROOM = 32  # tokens of a device in a schedule
LORA = (
    dict(name="lora", rank=4),
    dict(name="rslora", rank=2, alpha=4.0),
    dict(name="dora", rank=4),
)
BASE = (dict(name="lora", rank=4, base="int8"), dict(name="dora", rank=4, base="nf4"))
SPARSE = (
    dict(name="static", density=0.05),
    dict(
        name="periodic", density=0.2, every=1, granularity="block", block=(4, 4),
        selector="gradient",
    ),
    dict(name="spiel_ag", density=0.05, every=1, selector="gradient"),
    dict(name="spiel_ma", density=0.05, every=1),
)  # fmt: skip
LISA = dict(name="lisa", layers=1, every=1)
LEVELS = ("int8", "int4", "int4_delta", "qgz")
STORES = ("bf16x2", "int16", "int8", "sr", "collage")
ADAPTERS = {"lora", "base", "sparse", "lisa"}


def pair(a: str, b: str) -> tuple[str, str]:
    """The two in the order of the tables."""
    return tuple(sorted((a, b), key=NAMES.index))


def reason(a: str, b: str) -> Reason | None:
    """Why the two do not go together; None if they do."""
    return REASONS.get(pair(a, b))


def pairs() -> list[tuple[str, str]]:
    """All pairs that a config can have: of two features, and of a feature and an algorithm."""
    two = [*itertools.combinations(FEATURES, 2), *itertools.product(FEATURES, ALGORITHMS)]
    return [p for p in two if reason(*p) is None or reason(*p).said]


def algorithm(a: str, b: str) -> str:
    """The algorithm that a pair is tried with."""
    for name in (a, b):
        if name in ALGORITHMS:
            return name
    return "grpo" if "grpo" in (FEATURES[a].algorithm, FEATURES[b].algorithm) else "sft"


def role(algorithm: str) -> str:
    """The role that is trained."""
    return "reward" if algorithm == "reward_model" else "actor"


def changes(algorithm: str, *features: str, alone: bool = False) -> list[str]:
    """Changes of `tiny.py:algorithm=...,optim=sgd` as a command line makes them.

    Args:
        alone: True for the reference: one device, none of the features that change only where.
            Rows keep the sequences that a schedule by length would take from the data.
    """
    out: dict[str, Any] = {"plan": {"default": {"devices": [0]}}}
    if not alone:
        out["plan"] = plan(algorithm, features)
        out |= _where(features)
    elif "skrull" in features and algorithm not in SAMPLING:
        out["data.packed"] = False
    out |= _what(algorithm, features)
    said = [f"{algorithm}.{field}={value!r}" for field, value in out.items()]
    return said + (["model.param_dtype=bfloat16"] if "narrow" in features else [])


def variant(options: Collection[Any], feature: str, features: Collection[str]) -> Any:
    """Another kind of a feature for another partner, so that all kinds have several."""
    at = sum(NAMES.index(f) for f in features if f != feature)
    return options[at % len(options)]


def plan(algorithm: str, features: Collection[str]) -> str | dict[str, Any]:
    """Rows for the calls; two devices at least."""
    if "search" in features:
        return "search"
    sizes = {}
    if {"zero", "lossy"} & {*features}:
        sizes |= {"dcn": 2, "fsdp": 2}
    if "axes" in features:
        sizes |= {"fsdp": 2, "tensor": 2}
    if "seq" in features:
        sizes["seq"] = 2
    if not {"dcn", "fsdp"} & {*sizes}:
        sizes["data"] = 2
    row = {"devices": [*range(math.prod(sizes.values()))], **sizes}
    if "memory" in features:
        row["microbatches"] = 2
    rows = {"default": row}
    if {"meshes", "changes"} & {*features}:
        apart = "actor_gen" if algorithm in SAMPLING else "ref_inf"
        devices = [7, 6] if "meshes" in features else [4, 5, 6, 7]
        rows[apart] = {"devices": devices, "tensor": 2}
        if "memory" in features:
            rows[apart]["microbatches"] = 2
    if "memory" in features:
        rows[f"{role(algorithm)}_train"] = {**row, "offload": "opt"}
        # A reference that is the actor without its adapter is of a model that is trained.
        if algorithm not in ("sft", "reward_model", "raft") and not ADAPTERS & {*features}:
            rows["ref_inf"] = {**row, "offload": "params"}
    return rows


def _where(features: Collection[str]) -> dict[str, Any]:
    """The settings outside of the plan that only say where and how fast."""
    out: dict[str, Any] = {}
    if "search" in features:  # the same plan at every time and on every machine
        out["search"] = {"evaluations": 100, "calibrate": 0, "cluster": "h100:8"}
    if "skrull" in features:
        out["schedule"] = {"name": "skrull", "room": ROOM, "shapes": 2, "measure": False}
    if "changes" in features:
        out["sync.name"] = "changes"
    if "zero" in features:
        out["zero.name"] = "exact"
    if "lossy" in features:
        out["zero.name"] = variant(LEVELS, "lossy", features)
    return out


def _what(algorithm: str, features: Collection[str]) -> dict[str, Any]:
    """The settings that say what is computed."""
    out: dict[str, Any] = {}
    of = role(algorithm)
    if ADAPTERS & {*features}:
        out["adapt"] = {of: adapted(features)}
        if out["adapt"][of]["name"] == "spiel_ma":
            out |= {f"optim.{of}.name": "sm3", f"optim.{of}.lr": 0.02}
    if "narrow" in features:
        out |= {f"optim.{of}.{k}": v for k, v in _stored(features).items()}
    if "stale" in features:
        out["staleness"] = 1
    if "minibatches" in features:
        out["loss"] = {"epochs": 2, "minibatches": 2}
    elif algorithm == "ppo":
        out["loss"] = {"kl_coef": 0.1, "kl_target": 1.0}
    if "run" in features:
        measure = dict(problems=4, max_tokens=4, reward=dict(name="digit_share"), before=True)
        out["evaluate"] = measure
    return out


def adapted(features: Collection[str]) -> dict[str, Any]:
    """The part of the model that is trained."""
    found = {*features} & ADAPTERS
    if "lisa" in found:
        part = LISA | ({"rank": 4} if "lora" in found else {})
        part |= {"base": "int8"} if "base" in found else {}
    elif found == {"lora", "sparse"}:
        part = SPARSE[0] | {"rank": 4}
    elif found == {"base", "sparse"}:
        part = SPARSE[0] | {"mode": "overlay", "base": "int8"}
    elif found == {"lora", "base"}:
        part = LORA[1] | {"base": "nf4"}
    elif "narrow" in features and "sparse" in found:
        part = SPARSE[0]  # the store is of norms, which SM3 has none for
    else:
        (name,) = found
        part = variant({"lora": LORA, "base": BASE, "sparse": SPARSE}[name], name, features)
    return part | ({"whole": (".*norm/scale",)} if "narrow" in features else {})


def _stored(features: Collection[str]) -> dict[str, Any]:
    """The optimizer of 16-bit weights."""
    store = variant(STORES, "narrow", features)
    out = {"descent": True, "frozen": ("final_norm/scale",)}
    if store == "collage" and {"sparse", "lisa"} & {*features}:
        store = "bf16x2"  # they have one of optax's
    if store == "collage":
        return out | {"name": "collage_adamw", "lr": 0.3, "options": {"eps": 1.0}}
    return out | {"store": store}


HEAD = """\
# What goes with what

Written by `make docs` from `tests/combinations.py`, whose pairs the tests try.

A feature is a value of a config, and each cell below is a test on a tiny model: **yes** means that
a stage with both gives what it should, a number that it is refused before anything is compiled, for
the reason of that number. Reasons without a test are of two values of one field.
"""
TRIED = """\
## How each yes is tried

`tests/test_combinations.py` assembles a stage with both, on at least two of eight simulated
devices, and takes two steps of SGD. A pair of two features is tried with supervised fine-tuning,
or with GRPO if one of them needs samples. Where a feature has several kinds, each is tried with
some of the partners.

- If a feature changes only where and how fast (plans, schedules, exact communication), the
  parameters are those of the same stage on one device without it: each within 1e-3 of its change
  plus 1e-6 of its norm. Where weights and so their gradients have 16 bits, what is learned is
  within 2^-6 of its length.
- If it changes what is computed, the reference has it, too, and is on one device.
- Few bits between nodes round: what is learned is near what is learned without rounding, within
  0.05 (8 bits) to 0.5 (4 bits) of its length.
- A whole run with evaluation and checkpoints is killed after its first step and started again; it
  ends with the same exported bytes and metrics as one that was not.

The default tests try {few} pairs, and `make test-all` all {all}, and every no.
"""


def page() -> str:
    """The Markdown of docs/combinations.md."""
    texts: list[str] = []

    def cell(a: str, b: str) -> str:
        found = reason(a, b)
        if found is None:
            return "yes"
        if found.text not in texts:
            texts.append(found.text)
        return f"[{texts.index(found.text) + 1}](#reasons)"

    names = [*FEATURES]
    letters = [chr(ord("A") + i) for i in range(len(names))]
    listed = ["| | feature | in a config |", "|---|---|---|"]
    for letter, f in zip(letters, FEATURES.values(), strict=True):
        listed.append(f"| {letter} | {f.title} | {f.fields} |")
    two = [f"| | | {' | '.join(letters[:-1])} |", f"|---|---|{'---|' * (len(names) - 1)}"]
    for i, name in enumerate(names[1:], start=1):
        cells = [cell(other, name) for other in names[:i]] + [""] * (len(names) - 1 - i)
        two.append(f"| {letters[i]} | {FEATURES[name].title} | {' | '.join(cells)} |")
    of = [f"| | {' | '.join(letters)} |", f"|---|{'---|' * len(names)}"]
    for name in ALGORITHMS:
        of.append(f"| `{name}` | {' | '.join(cell(f, name) for f in names)} |")
    reasons = [f"{i}. {text}" for i, text in enumerate(texts, start=1)]
    tried = [p for p in pairs() if reason(*p) is None]
    return "\n".join(
        [
            HEAD, *listed, "", "## Two features", "", *two, "", "## Algorithms and features", "",
            *of, "", "## Reasons", "", *reasons, "", TRIED.format(few=len(FEW), all=len(tried)),
        ]
    ).rstrip() + "\n"  # fmt: skip
