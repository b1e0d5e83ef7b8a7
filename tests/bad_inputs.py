"""361 inputs that cannot be used, made from a fixed seed: what commands must refuse in one line.

  PYTHONPATH=. python tests/bad_inputs.py [KIND ...]

tries them all, or those of some kinds, and prints how many were not refused as they should be.
"""

import collections
import dataclasses
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import bad_files
import bad_models
from trials import Attempt, Case, outcome

from jaxrl_eff.parallel import host

if "jax" not in sys.modules:
    host.simulate(8)

from jaxrl_eff import schema
from jaxrl_eff.algorithms import ALGORITHMS
from jaxrl_eff.train import settings

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests" / "tiny.py")
COUNT = 361
NAN = math.nan


def cases() -> list[Case]:
    """All of them, the same every time."""
    rng = random.Random(0)
    others = [*commands(), *environments(), *files(), *ranges()]
    values = list(_values())
    return [*rng.sample(values, COUNT - len(others)), *others]


# Values of a config


def _leaves(cls: type, path: str) -> Iterator[tuple[str, object, tuple]]:
    """(path, type, marks) of every field of a schema."""
    import typing

    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(plain):
            yield from _leaves(plain, f"{path}{name}.")
        yield f"{path}{name}", plain, marks


_NOTHING = ("no such thing",)
_NAMED = {  # texts that must be one of some
    "algorithm", "tokenizer", "nonfinite", "source", "format", "overlong", "name", "schedule",
    "store", "granularity", "selector", "decay", "mode", "base", "on_drop", "start", "dtype",
    "param_dtype", "remat", "path", "metric", "rises_over", "loss_agg", "kl_in", "kl_estimator",
    "data",
}  # fmt: skip


def _bad(path: str, hint: object, marks: tuple) -> list[object]:
    """Values that cannot stand in a field."""
    low = [m.low for m in marks if isinstance(m, schema.Within)]
    below = [-1] if low and low[0] >= 0 else []
    name = path.rpartition(".")[2]
    text = list(_NOTHING) if name in _NAMED else []
    by_type = {
        int: ["7x", 1.5, True, None, (1,), NAN, 10**30, *below],
        float: ["x", True, None, (1.0,), NAN, *(map(float, below))],
        str: [3, 1.5, None, ("a",), *text],
        bool: ["yes", 1, None, ()],
    }
    if hint in by_type:
        return by_type[hint]
    shown = str(hint)
    if shown.startswith("tuple"):
        return ["abc", 3, ({},), (None,)]
    if shown.startswith("dict"):
        return ["abc", 3, (1,), {3: 1}]
    if dataclasses.is_dataclass(hint):
        return ["abc", 3, None, {"no_such_key": 1}, {3: 1}]
    return []


def _values() -> Iterator[Case]:
    sections = [("", settings.Run, "ppo"), ("ppo.", settings.StageSettings, "ppo")]
    sections += [
        (f"{name}.loss.", ALGORITHMS[name].config, name) for name in ("sft", "dpo", "ppo", "grpo")
    ]
    sections += [
        ("ppo.optim.actor.", settings.OptimSettings, "ppo"),
        ("grpo.adapt.actor.", settings.AdaptSettings, "grpo"),
    ]
    for prefix, cls, algorithm in sections:
        for path, hint, marks in _leaves(cls, prefix):
            if path == "stage" or (path.startswith("stage.")):
                continue
            for value in _bad(path, hint, marks):
                yield _value(path, value, algorithm)


def _value(path: str, value: object, algorithm: str) -> Case:
    spec, first = f"{TINY}:algorithm={algorithm},devices=2", ()
    if ".adapt." in path:
        way = {"name": "spiel_ag", "selector": "gradient"}
        first = ((path.rpartition(".")[0], way),)
    changes = (*first, (path, value))
    word = path.rpartition(".")[2]
    told = "a dict with the key 3" if value == {3: 1} else repr(value)
    return Case(
        "value", f"{path} = {told}", (word,), lambda *_: Attempt(spec=spec, changes=changes)
    )


def ranges() -> list[Case]:
    """Values that are of the right type, each alone possible."""
    rows = [
        ("grpo", "grpo.batch", 10**10, "batch"),
        ("sft", "sft.batch", 7, "7"),
        ("sft", "model.shape.ffn", 2**26, "GB"),
        ("sft", "model.shape.heads", 0, "heads"),
        ("sft", "model.shape.layers", -3, "layers"),
        ("sft", "sft.optim.actor.frozen", ("(",), "frozen"),
        ("sft", "sft.optim.actor.frozen", ("no_such.*",), "no_such"),
        ("grpo", "grpo.reward", {"name": "matches", "options": {"pattern": "("}}, "pattern"),
        ("grpo", "grpo.reward", {"name": "contains", "options": {"words": 3}}, "contains"),
        ("grpo", "grpo.reward", {"name": "contains", "options": {}}, "contains"),
        ("grpo", "grpo.reward", {"name": "length_penalty", "options": {"soft": "a"}}, "penalty"),
        ("grpo", "grpo.reward", {"name": "tagged", "options": {"names": 3}}, "tagged"),
        ("grpo", "grpo.data.options", {"digits": "x"}, "digits"),
        ("grpo", "grpo.data.options", {"digits": -1}, "digits"),
        ("grpo", "grpo.data.options", {"train": 0.5}, "train"),
        ("grpo", "grpo.sampling.temperature", -1.0, "temperature"),
        ("grpo", "grpo.sampling.max_tokens", 10**6, "max_tokens"),
        ("grpo", "grpo.sampling.stop", (10**6,), "stop"),
        ("grpo", "grpo.models.actor", "/no/where", "/no/where"),
        ("grpo", "grpo.plan", {"default": {"devices": [0, 0]}}, "plan"),
        ("grpo", "grpo.plan", {"default": {"devices": 10**12}}, "devices"),
        ("grpo", "grpo.sampling.pad", 10**6, "pad"),
        ("grpo", "grpo.data.options", {"wrong": 0.5}, "wrong"),
        ("sft", "model.rope", {"kind": "ntk", "factor": True}, "factor"),
        ("sft", "sft.optim.actor.options", {"learning_rate": 1.0}, "learning_rate"),
        ("sft", "sft.optim.actor.options", {"mu_dtype": 3}, "mu_dtype"),
        ("grpo", "grpo.plan", {"default": {"devices": ["a"]}}, "plan"),
        ("grpo", "grpo.plan", {"default": {"tensor": -1}}, "plan"),
        ("grpo", "grpo.plan", {"default": {"microbatches": 3}}, "microbatches"),
        ("sft", "sft.evaluate", {"problems": 2, "max_tokens": 400}, "max_tokens"),
        ("sft", "sft.evaluate", {"problems": 10**9, "max_tokens": 2}, "problems"),
        ("sft", "sft.sampling", {"max_tokens": 2}, "sampling"),
        ("sft", "stages", ("sft", "sft"), "sft"),
        ("sft", "stages", ("rm",), "rm"),
        ("sft", "model.rope", {"kind": "ntk"}, "rope"),
        ("sft", "model.rope", {"kind": "yarn", "factor": -1.0}, "factor"),
        ("sft", "sft.adapt", {"actor": {"name": "lora", "rank": 2, "targets": ("x",)}}, "x"),
        ("sft", "sft.optim.actor.options", {"b1": "x"}, "b1"),
        ("sft", "sft.optim.actor.options", {"b1": 7.0}, "b1"),
        ("sft", "tokenizer", "chars:", "tokenizer"),
        ("sft", "tokenizer", "chars:0123456789>0", "tokenizer"),
    ]
    return [
        dataclasses.replace(_value(path, value, algorithm), kind="range", words=(word,))
        for algorithm, path, value, word in rows
    ]


# Commands


def commands() -> list[Case]:
    """Arguments that a command cannot use; HOME and DIR stand for directories."""
    model, delta = "--model=HOME/model", "--base=HOME/model"
    plan = (f"--config={TINY}", "--cluster=h100:8", "--workdir=DIR/plan")
    long = ("--mesh=seq2", "--model=HOME/model", "--hardware=h100", "--lengths=HOME/lengths")
    rows = [
        ("generate", ("--prompt=a",), "--model"),
        ("generate", (model,), "--prompt"),
        ("generate", (model, "--prompt=a", "--temperature=nan"), "temperature"),
        ("generate", (model, "--prompt=a", "--temperature=-1"), "temperature"),
        ("generate", (model, "--prompt=a", "--max_tokens=-5"), "max_tokens"),
        ("generate", (model, "--prompt=a", "--max_tokens=99999999"), "max_tokens"),
        ("generate", (model, "--prompt=a", "--top_k=-2"), "top_k"),
        ("generate", (model, "--prompt=a", "--top_p=nan"), "top_p"),
        ("generate", (model, "--prompt=a", "--seed=99999999999999999999"), "seed"),
        ("generate", (model, "--prompt=a", "--dtype=int8"), "int8"),
        ("generate", (model, "--prompt=\udcff"), "udcff"),
        ("generate", (model, "--prompt=a", "--what=1"), "--what"),
        ("generate", ("--model=HOME/rows.jsonl", "--prompt=a"), "rows.jsonl"),
        ("generate", ("--model=\udcff", "--prompt=a"), "--model"),
        ("plan", (*plan[:2], "--workdir=HOME/rows.jsonl"), "rows.jsonl"),
        ("plan", (*plan, "--seconds=nan"), "seconds"),
        ("plan", (*plan, "--seconds=-1"), "seconds"),
        ("plan", (*plan, "--smallest=0"), "smallest"),
        ("plan", (*plan, "--seed=-1"), "seed"),
        ("plan", (*plan, "--cluster=h100:0"), "h100:0"),
        ("plan", (*plan, "--cluster=h100:99999999999x99999999999"), "h100"),
        ("plan", (*plan, "--cluster=:"), "cluster"),
        ("plan", (*plan, "--stage=none"), "none"),
        ("plan", (*plan, "--config.sft.steps"), "steps"),
        ("plan", (*plan, "--config.=3"), "config"),
        ("plan", (*plan, "--config.sft.optim.actor.lr=nan"), "lr"),
        ("plan", (*plan, "--config.sft.optim={[]: 1}"), "optim"),
        ("plan", ("--config=HOME", "--cluster=h100:8"), "HOME"),
        ("balance", long[:3], "--lengths"),
        ("balance", (*long, "--mesh=seq0"), "seq0"),
        ("balance", (*long, "--mesh=what2"), "what2"),
        ("balance", (*long, "--batch=-1"), "batch"),
        ("balance", (*long, "--lengths=HOME"), "HOME"),
        ("balance", (*long, "--room=1"), "1 tokens"),
        ("balance", (*long, "--hardware=abacus"), "abacus"),
        ("balance", (*long, "--page=HOME/rows.jsonl/x"), "rows.jsonl"),
        ("needle", (model, "--lengths=0"), "lengths"),
        ("needle", (model, "--lengths=,"), "lengths"),
        ("needle", (model, "--samples=-1"), "samples"),
        ("needle", (model, "--seed=-1"), "seed"),
        ("needle", (model, "--text=HOME/none"), "HOME/none"),
        ("delta", ("show", "HOME/none"), "HOME/none"),
        ("delta", ("show", "HOME"), "HOME"),
        ("delta", ("diff", delta, "--tuned=HOME", "--out=DIR/d"), "HOME"),
        ("delta", ("apply", delta, "--delta=HOME/delta", "--out=HOME/model"), "HOME/model"),
        ("delta", ("audit", delta, "--delta=HOME/delta", "--max_rms=nan"), "rms"),
        ("delta", ("compose", "HOME/delta", "--weights=nan", "--out=DIR/d"), "weights"),
        ("delta", ("remove", "--model=HOME/adapter", "--delta=HOME/delta", "--out=DIR/o"), "HOME"),
        ("report", (), "workdir"),
        ("report", ("HOME/none",), "HOME/none"),
        ("report", ("HOME/rows.jsonl",), "rows.jsonl"),
        ("doctor", ("--quik",), "--quik"),
    ]
    return [
        Case("command", f"{module} {' '.join(argv)}", (word,), _call(module, argv))
        for module, argv, word in rows
    ]


def _call(module: str, argv: tuple[str, ...], environment: dict | None = None) -> Callable:
    return lambda home, folder: Attempt(
        module, tuple(a.replace("HOME", str(home)).replace("DIR", str(folder)) for a in argv),
        environment=environment,
    )  # fmt: skip


def environments() -> list[Case]:
    """Variables, and what only a process of its own can be given."""
    main = (f"--config={TINY}", "--workdir=DIR/run")
    cuda, none = {"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "no_such_platform"}
    rows = [
        ("main", main, cuda, "JAX_PLATFORMS"),
        ("main", main, none, "no_such_platform"),
        ("doctor", ("--quick",), cuda, "JAX_PLATFORMS"),
        ("generate", ("--model=HOME/model", "--prompt=a"), cuda, "JAX_PLATFORMS"),
        ("needle", ("--model=HOME/model",), cuda, "JAX_PLATFORMS"),
        ("main", (*main, "--wrkdir=1"), {}, "wrkdir"),
        ("main", (*main, "--processes=two"), {}, "processes"),
        ("main", (*main, "--processes=2"), {}, "--coordinator"),
        ("main", (*main, "--processes=2", "--process=2", "--coordinator=a:1"), {}, "--process"),
        ("main", (main[0],), {}, "--workdir"),
        ("main", (main[0], "--workdir=HOME/rows.jsonl"), {}, "rows.jsonl"),
        ("main", (main[0], "--workdir=HOME/rows.jsonl/x"), {}, "rows.jsonl"),
        ("main", (*main, "--config.simulate_devices=-2"), {}, "simulate_devices"),
        ("main", (*main, "--config.sft.batch=10000000000"), {}, "batch"),
        ("main", ("--config=DIR/none.py", main[1]), {}, "none.py"),
        ("main", (*main, "--config.sft.steps=\udcff"), {}, "steps"),
    ]
    return [
        Case("process", f"{module} {' '.join(argv)} {env}", (word,), _call(module, argv, env))
        for module, argv, env, word in rows
    ]


# Files


def files() -> list[Case]:
    out = []
    for kind, name, words, write in (*bad_files.FILES, *bad_models.FILES):
        out.append(Case(kind, name, words, _written(write)))
    return out


def _written(write: Callable) -> Callable:
    def attempt(home: Path, folder: Path) -> Attempt:
        found = write(home, folder)
        if isinstance(found, dict):
            return Attempt(spec=found)
        if isinstance(found, str):
            return Attempt(spec=found)
        module, *argv = found
        return Attempt(module, tuple(argv))

    return attempt


def main(kinds: list[str]) -> int:
    """Tries the cases and prints what went wrong; returns the exit status."""
    tried, wrong = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as where:
        made = bad_files.home(Path(where) / "home")
        for i, case in enumerate(cases()):
            if kinds and case.kind not in kinds:
                continue
            folder = Path(where) / str(i)
            folder.mkdir()
            try:
                said = outcome(case, made, folder)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                said = f"passed on {type(error).__name__}: {error}"
            tried[case.kind] += 1
            if said:
                wrong[case.kind] += 1
                print(f"{case.kind}: {case.name}\n    {said}", flush=True)
    for kind, n in tried.items():
        print(f"{kind:12} {n:4} tried, {wrong[kind]:3} not refused as they should be")
    print(f"{'all':12} {tried.total():4} tried, {wrong.total():3} not refused as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
