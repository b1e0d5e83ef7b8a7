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


def check_law(start, ours, theirs):
    """Each equal to rounding, which is that of bfloat16 for what is stored in it."""
    assert ours.keys() == theirs.keys()
    moved = 0.0
    for name, want in theirs.items():
        got, first = ours[name], start[name]
        assert got.dtype == want.dtype, name
        if got.dtype.itemsize == 2:
            a, b = (np.asarray(x).view(np.int16).astype(np.int32) for x in (got, want))
            assert np.abs(a - b).max() <= 1 and np.mean(a != b) < 0.02, name
        a, b, first = (np.asarray(x, np.float64) for x in (got, want, first))
        change = norm(b - first)
        moved = max(moved, change / max(norm(first), 1e-9))
        if got.dtype.itemsize > 2:
            assert norm(a - b) <= 1e-3 * change + 1e-6 * norm(b) + 1e-9, name
        elif got.dtype.itemsize == 1:
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert moved > 1e-3  # or nothing was compared


def check_near(start, ours, theirs, near):
    """What is learned differs by less than this fraction of it."""

    def apart(a, b):
        return norm([norm(np.asarray(a[k], np.float64) - np.asarray(b[k], np.float64)) for k in b])

    assert apart(ours, theirs) <= near * apart(start, theirs)


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
        level = next((x.split("'")[1] for x in changes if ".zero.name=" in x), "exact")
        if level == "exact":
            check_law(start, ours, theirs)
        else:
            check_near(start, ours, theirs, NEAR[level])


@pytest.mark.parametrize(("a", "b"), FEW, ids=map("-".join, FEW))
def test_the_riskiest_pairs_go_together(a, b, tmp_path, monkeypatch):
    assert reason(a, b) is None
    check(a, b, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), pairs(), ids=map("-".join, pairs()))
def test_every_pair_goes_together_or_is_refused(a, b, tmp_path, monkeypatch):
    check(a, b, tmp_path, monkeypatch)
