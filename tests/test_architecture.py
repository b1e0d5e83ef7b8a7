"""What may import what, and what must work alone."""

import ast
import subprocess
import sys

import pytest
from launch import ROOT

PACKAGE = ROOT / "jaxrl_eff"

# Every file may import those of its own line and of the lines above; but optim only itself.
RANKS = (
    (
        *("shapes", "tree", "masked", "meters", "edges", "hardware", "host", "arrays"),
        *("beside", "operations", "peers", "secret"),
    ),
    ("schema", "running", "agreement", "files", "fields"),
    ("optim",),
    ("models", "parallel", "data"),
    ("rollout", "graph", "rewards", "timeline", "deltas"),
    ("programs", "sharded", "layouts", "movements", "lowering", "summed", "dataflow"),
    ("mixed", "pieces", "packed"),
    ("planner",),
    ("algorithms",),
    ("manifest", "stored", "workdir"),
    ("checkpoint", "metrics", "console", "arguments", "settings", "plans", "charts", "interrupts"),
    ("cadence", "identity"),
    ("evaluate", "calibrate"),
    (
        "adapt",
        "examples",
        "footprint",
        "long",
        "parts",
        "unused",
        "fits",
        "held_out",
        "weights",
        "stages",
    ),
    ("state",),
    ("progress", "resume"),
    ("train",),
    ("report", "doctor", "generate", "delta", "export", "summary"),
    ("plan_page", "needle"),
    ("schedule_page",),
    ("startup",),
    ("main", "plan", "schedule"),
)
# Within a line, who may import whom.
APART = {
    "models": {"models", "optim"},
    "parallel": {"parallel"},
    "data": {"data"},
    "rewards": {"rewards", "data"},
    "rollout": {"rollout", "models"},
    "deltas": {"deltas", "models"},
    "graph": {"graph", "parallel"},
    "planner": {"planner", "parallel", "data", "graph", "models", "rollout"},
    "timeline": {"timeline"},
    "optim": {"optim"},
    "adapt": {"adapt", "graph", "models", "optim", "settings"},
    "settings": {"settings"},
    "arguments": {"arguments"},
    "manifest": {"manifest"},
    "workdir": {"workdir"},
    "stored": {"stored", "manifest"},
    "checkpoint": {"checkpoint", "manifest", "stored"},
    "metrics": {"metrics"},
    "console": {"console"},
    "interrupts": {"interrupts"},
}
LEAVES = {*RANKS[0], *RANKS[1]}


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """Rooms of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = node.module.split(".")
            if parts[0] == "jaxrl_eff":
                names = [a.name for a in node.names]
                found |= {parts[1]} if parts[1:] else set(names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path} has a relative import")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "jaxrl_eff" and parts[1:]:
                    found.add(parts[1])
    return found - {"__version__"}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


def test_every_room_has_a_rank():
    named = [r for line in RANKS for r in line]
    assert len(named) == len(set(named))
    assert {room(p) for p in FILES} == set(named)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    here = room(path)
    rank = next(i for i, line in enumerate(RANKS) if here in line)
    below = {r for line in RANKS[: rank + 1] for r in line} - {"optim"}
    if here in APART:
        below = APART[here] | (LEAVES if here != "optim" else set())
    elif rank >= next(i for i, line in enumerate(RANKS) if "dataflow" in line):
        below |= {"optim"}
    assert imports(path) <= below, f"{here} imports {sorted(imports(path) - below)}"


def test_configs_import_nothing_but_configdict_and_their_common():
    for path in sorted((ROOT / "configs").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] in ("ml_collections", "configs", "typing"), path


def python(code, timeout=120):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_optim_needs_jax_and_optax_alone():
    python("""
import sys
BLOCKED = ("flax", "ml_collections", "orbax", "grain", "safetensors", "tensorboardX", "rich",
           "tokenizers", "jinja2", "jaxtyping", "beartype", "wandb")
class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from jaxrl_eff import optim
import jax, jax.numpy as jnp, optax
optim.collage_adamw(1e-3).init({"a": jnp.ones(3, jnp.bfloat16)})
tx = optim.optimizer("adamw", optim.warmup_then("cosine", peak=0.1, updates=10), frozen=("a",))
params = {"a": jnp.ones(3), "b": jnp.ones(3)}
updates, _ = tx.update(params, tx.init(params), params)
assert float(jnp.abs(updates["a"]).sum()) == 0
loaded = {m for m in sys.modules if m.startswith("jaxrl_eff.")}
assert all(m.startswith("jaxrl_eff.optim") for m in loaded), loaded
""")


def test_the_package_imports_quickly_and_without_jax():
    seconds = min(
        float(
            python(
                "import time, sys; t = time.perf_counter(); import jaxrl_eff; "
                "assert 'jax' not in sys.modules and jaxrl_eff.__version__; "
                "print(time.perf_counter() - t)"
            )
        )
        for _ in range(3)
    )
    assert seconds < 1


def test_rooms_open_on_demand_and_unknown_ones_are_named():
    import jaxrl_eff

    assert jaxrl_eff.masked.mean and "dataflow" in dir(jaxrl_eff)
    with pytest.raises(AttributeError, match=r"no room 'nope'; it has algorithms"):
        _ = jaxrl_eff.nope


def test_the_command_is_understood_before_jax_is_loaded():
    """So that a mistake in it costs no seconds."""
    python(
        "import sys; from jaxrl_eff import main, arguments, settings; "
        "settings.run(arguments.load('tests/tiny.py')); assert 'jax' not in sys.modules"
    )
