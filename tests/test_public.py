"""Every public name exists, is documented, and has an example that gives what it says."""

import doctest
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from launch import ROOT

import jaxrl_eff

PACKAGE = ROOT / "jaxrl_eff"
ROOMS = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in PACKAGE.rglob("__init__.py")
    if path.parent != PACKAGE
)
# Rooms have a page each in docs/ instead of an example. `math` needs the extra of its name.
EXAMPLES = sorted(
    [name for name in jaxrl_eff.__all__ if f"jaxrl_eff.{name}" not in ROOMS]
    + [f"core.{name}" for name in ("draw", "generate", "infer", "local", "order", "train")]
    + [f"data.{name}" for name in jaxrl_eff.data.__all__ if name not in ("needles", "toys")]
    + [f"models.{name}" for name in ("Rope", "Warp", "flops_per_token", "last_score", "warp")]
    + [f"rewards.{name}" for name in jaxrl_eff.rewards.__all__ if name != "math"]
    + ["deltas.compose", "deltas.save", "models.token_scores", "optim.store_weights"]
    + ["planner.Lengths"]
)
FLAGS = doctest.ELLIPSIS | doctest.FAIL_FAST


def named(name):
    found = jaxrl_eff
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_gives_what_it_says(name, tmp_path, monkeypatch):
    """In an empty directory and with JAX's defaults, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    given = {"jax": jax, "jnp": jnp, "np": np, "optax": optax}
    text = inspect.getdoc(named(name)) or ""
    test = doctest.DocTestParser().get_doctest(text, given, name, name, 0)
    assert test.examples, f"{name} has no example"
    said = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("room", ["jaxrl_eff", *ROOMS])
def test_a_room_opens_the_names_that_it_lists(room):
    package = importlib.import_module(room)
    listed = getattr(package, "__all__", [])
    assert len(set(listed)) == len(listed)
    for name in listed:
        assert getattr(package, name) is not None
    assert (package.__doc__ or "").strip()


@pytest.mark.parametrize("room", ["jaxrl_eff", *ROOMS])
def test_every_public_function_and_class_is_documented(room):
    package = importlib.import_module(room)
    for name in getattr(package, "__all__", []):
        found = getattr(package, name)
        if callable(found) or inspect.ismodule(found):
            assert inspect.getdoc(found), f"{room}.{name}"


def test_unknown_names_are_answered_by_the_known_ones():
    with pytest.raises(AttributeError, match=r"jaxrl_eff: unknown name 'nope'; expected one of \["):
        _ = jaxrl_eff.nope
    with pytest.raises(AttributeError, match=r"jaxrl_eff\.core: unknown name 'nope'"):
        _ = jaxrl_eff.core.nope
    assert "core" in dir(jaxrl_eff) and "Graph" in dir(jaxrl_eff.core)
