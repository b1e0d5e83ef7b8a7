"""Every pair of features of a stage goes together, or is refused for the reason that is given."""

import functools

import combinations
import launch
import numpy as np
import pytest
from combinations import FEW, LEVELS, pairs, reason
from test_random_plans import learned
from test_resume import stopped

from jaxrl_eff import tree
from jaxrl_eff.train import assembly

STEPS = 2
# Of the length of what is learned without rounding. `test_zero.py` has one step by itself.
NEAR = dict(zip(LEVELS, (0.05, 0.5, 0.5, 0.5), strict=True))
# The same where weights and their gradients have the 8 bits of bfloat16.
NARROW = 2**-6


def config(a, b, *, alone=False, arg="optim=sgd"):
    algorithm = combinations.algorithm(a, b)
    features = [name for name in (a, b) if name not in combinations.ALGORITHMS]
    said = combinations.changes(algorithm, *features, alone=alone)
    return f"algorithm={algorithm},{arg}", tuple(said)


def models_after(arg, changes):
    """First and last parameters by role and name."""
    run = assembly.assemble(launch.config(arg, *changes))
    (stage,) = run.stages
    return [*map(tree.flat, learned(run, stage.step.build(stage.batch), STEPS))]


alone = functools.cache(models_after)  # shared by all pairs that leave the same


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def apart(a, b):
    """The distance of each leaf, by name."""
    return {k: norm(np.asarray(a[k], np.float64) - np.asarray(b[k], np.float64)) for k in b}


def check_moved(start, last):
    """Something was learned, or nothing is compared."""
    assert any(x > 1e-3 * norm(last[k]) for k, x in apart(start, last).items())


def check_law(start, ours, theirs):
    """Each equal to rounding, and codes bit for bit."""
    assert ours.keys() == theirs.keys()
    change, differs = apart(start, theirs), apart(ours, theirs)
    for name, want in theirs.items():
        assert ours[name].dtype == want.dtype, name
        assert differs[name] <= 1e-3 * change[name] + 1e-6 * norm(want) + 1e-9, name
        assert want.dtype.itemsize > 1 or not differs[name], name


def check_near(start, ours, theirs, near):
    """What is learned differs by less than this fraction of it."""
    differs, learned_ = (norm([*apart(x, theirs).values()]) for x in (ours, start))
    assert differs <= near * learned_


def check_refused(a, b):
    with pytest.raises(ValueError, match=reason(a, b).said):
        arg, changes = config(a, b)
        run = assembly.assemble(launch.config(arg, *changes))
        (stage,) = run.stages
        stage.step.build(stage.batch)


def check_run(a, b, tmp_path, monkeypatch):
    """A killed run goes on to the same end."""
    arg, changes = config(a, b, arg="optim=sgd,every=1")
    run = launch.config(arg, *changes)
    assert launch.train(run, tmp_path / "whole")
    stopped(monkeypatch, run, tmp_path / "killed", after=1)
    assert launch.train(run, tmp_path / "killed")
    assert launch.export(tmp_path / "killed") == launch.export(tmp_path / "whole")
    assert launch.numbers(tmp_path / "killed") == launch.numbers(tmp_path / "whole")
    ended = [launch.document(tmp_path / name, "result")["results"] for name in ("killed", "whole")]
    assert ended[0] == ended[1] and len(ended[0]) == 2  # before and after training


def check(a, b, tmp_path, monkeypatch):
    if reason(a, b):
        check_refused(a, b)
    elif "run" in (a, b):
        check_run(a, b, tmp_path, monkeypatch)
    else:
        arg, changes = config(a, b)
        ours, (start, theirs) = models_after(arg, changes)[1], alone(*config(a, b, alone=True))
        check_moved(start, theirs)
        level = next((x.split("'")[1] for x in changes if ".zero.name=" in x), "exact")
        if level != "exact":
            check_near(start, ours, theirs, NEAR[level])
        elif "narrow" in (a, b):
            check_near(start, ours, theirs, NARROW)
        else:
            check_law(start, ours, theirs)


@pytest.mark.parametrize(("a", "b"), FEW, ids=map("-".join, FEW))
def test_the_riskiest_pairs_go_together(a, b, tmp_path, monkeypatch):
    assert reason(a, b) is None
    check(a, b, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), pairs(), ids=map("-".join, pairs()))
def test_every_pair_goes_together_or_is_refused(a, b, tmp_path, monkeypatch):
    check(a, b, tmp_path, monkeypatch)
