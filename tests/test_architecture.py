"""What may import what, and what must work alone."""

import ast
import subprocess
import sys

import pytest
from launch import ROOT

PACKAGE = ROOT / "jaxrl_eff"

# Leaves, which everybody but optim may import.
LEAVES = {"public", "types", "tree", "masked", "schema", "secret", "fields", "files", "beside"}
# Which rooms, or files of them, a room may import besides itself and the leaves.
TABLE = {
    "optim": (),
    "parallel": (),
    "data": (),
    "core": ("parallel", "optim", "data.balance"),
    "models": ("parallel.attention.context",),
    "peft": ("core.specs", "models", "optim"),
    "rollout": ("models", "data"),
    "checkpoints": ("models", "peft", "parallel.processes"),
    "algorithms": ("core", "models", "rollout"),
    "planner": (
        *(
            "core.graph",
            "core.specs",
            "core.glossary",
            "parallel",
            "models",
            "peft",
            "rollout.sampling",
        ),
        "data.balance",
    ),
    "train": (
        *("optim", "data", "parallel", "core", "models", "peft", "rollout", "checkpoints"),
        *("algorithms", "planner"),
    ),
}
TABLE["cli"] = (*TABLE["train"], "train")
TABLE["main"] = TABLE["__main__"] = (*TABLE["cli"], "cli")

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for p in FILES
}


def imports(path):
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            base = f"{node.module}.".removeprefix("jaxrl_eff.")
            if base != f"{node.module}.":
                inner = {base + a.name for a in node.names}
                found |= {m if m in MODULES else base.removesuffix(".") for m in inner}
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith("jaxrl_eff") for a in node.names), path
    return found - {"", "__version__"}


def test_every_file_is_in_a_room():
    rooms = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in FILES}
    assert rooms == {*TABLE, *LEAVES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    name = str(path.relative_to(PACKAGE))
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = (room, *LEAVES, *TABLE.get(room, ()))
    if room == "optim":
        allowed = ("optim",)
    for module in imports(path):
        assert any(f"{module}.".startswith(f"{a}.") for a in allowed), f"{name} imports {module}"


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
loaded = {m for m in sys.modules if m.startswith("jaxrl_eff.")} - {"jaxrl_eff.public"}
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


def test_the_command_is_understood_before_jax_is_loaded():
    """So that a mistake in it costs no seconds."""
    python(
        "import sys; from jaxrl_eff import main; "
        "from jaxrl_eff.train import config_file, settings; "
        "settings.run(config_file.load('tests/tiny.py')); assert 'jax' not in sys.modules"
    )
