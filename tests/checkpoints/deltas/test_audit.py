"""What the audit measures, and that it decides."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.checkpoints import deltas
from jaxrl_eff.checkpoints.deltas import Limits
from jaxrl_eff.models import LMConfig, apply, init, unembed

CFG = LMConfig(
    vocab=11, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, max_length=32,
    bos=1, eos=(2,), pad=0, init_std=0.3,
)  # fmt: skip


def models(dtype=np.float32):
    rng = np.random.default_rng(0)
    base = {"a": rng.normal(0, 1, (8, 9)).astype(dtype), "b": rng.normal(0, 1, 20).astype(dtype)}
    new = {k: x.copy() for k, x in base.items()}
    new["a"][2, :5] += np.asarray([0.5, -0.25, 0.125, 1, 2], dtype)
    base["b"][3] = 0
    new["b"][3] = 0.5
    return base, new


def test_the_rows_are_those_of_dense_arrays():
    base, new = models()
    found = deltas.audit(base, deltas.diff(base, new))
    assert found.passed and found.kl is None and found.changed == 6
    for row in found.rows:
        w, d = base[row.name].astype(np.float64), new[row.name].astype(np.float64)
        d = d - w
        assert (row.size, row.changed, row.share) == (w.size, (d != 0).sum(), (d != 0).mean())
        assert row.rms == pytest.approx(np.sqrt((d**2).mean() / (w**2).mean()), rel=1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            assert row.largest == np.nanmax(np.where(d != 0, np.abs(d) / np.abs(w), 0))
    assert found.rows[1].largest == np.inf


@pytest.mark.parametrize(
    ("limits", "fails"),
    [
        ({}, ()),
        ({"share": 0.07}, ()),
        ({"share": 0.06}, ("a: share is 0.0694, over 0.06.",)),
        ({"rms": 1}, ()),
        ({"rms": 0.2}, ("a: rms is 0.2",)),
        ({"largest": 1e9}, ("b: largest is inf, over 1e+09.",)),
        ({"share": 0, "rms": 0}, ("a: share", "a: rms", "b: share", "b: rms")),
    ],
)
def test_only_what_is_over_its_limit_fails(limits, fails):
    base, new = models()
    found = deltas.audit(base, deltas.diff(base, new), limits=Limits(**limits))
    assert len(found.failures) == len(fails) and found.passed == (not fails)
    for told, start in zip(found.failures, fails, strict=True):
        assert told.startswith(start)


def test_a_nan_is_over_every_limit():
    base, new = models()
    new["a"][0, 0] = np.nan
    found = deltas.audit(base, deltas.diff(base, new), limits=Limits(rms=1e30))
    assert [f.split(" is ")[0] for f in found.failures] == ["a: rms"]
    zero = {"w": np.zeros(3, np.float32)}
    made = {"w": np.array([0, 1, 0], np.float32)}
    assert not deltas.audit(zero, deltas.diff(zero, made), limits=Limits(rms=9.0)).passed


def test_the_callers_functions_decide():
    base, new = models(np.float16)
    delta = deltas.diff(base, new)
    seen = []

    def kl(old, tuned):
        seen.append((old, tuned))
        return 0.25

    suite = {"finite": lambda p: np.isfinite(p["a"]).all(), "small": lambda p: p["a"].max() < 1}
    found = deltas.audit(base, delta, kl=kl, suite=suite, limits=Limits(kl=0.3))
    assert seen[0][0] is base and np.array_equal(seen[0][1]["a"], new["a"])
    assert found.kl == 0.25 and found.suite == {"finite": True, "small": False}
    assert found.failures == ("the test 'small' was not passed.",)
    assert deltas.audit(base, delta, kl=lambda *_: 0.4, limits=Limits(kl=0.3)).failures == (
        "KL from the base is 0.4 nats a token, over 0.3.",
    )
    assert not deltas.audit(base, delta, kl=lambda *_: float("nan"), limits=Limits(kl=1)).passed
    with pytest.raises(ValueError, match=r"kl=0\.3 needs a function"):
        deltas.audit(base, delta, limits=Limits(kl=0.3))
    with pytest.raises(ValueError, match=r"share=-1 should be at least 0"):
        Limits(share=-1)
    with pytest.raises(ValueError, match="rms=nan"):
        Limits(rms=float("nan"))
    with pytest.raises(ValueError, match="made for the base"):
        deltas.audit(new, delta)


def test_the_report_says_everything_twice():
    base, new = models()
    found = deltas.audit(
        base, deltas.diff(base, new), kl=lambda *_: 0.5, suite={"sums": lambda p: False},
        limits=Limits(share=0.06, kl=1),
    )  # fmt: skip
    text = found.text()
    for part in ("tensor", "a  ", "6.9444%", "inf", "0.5 nats", "sums: failed", "over 0.06"):
        assert part in text
    assert text.endswith("failed: 6 entries change.")
    told = json.loads(found.json())
    assert told["passed"] is False and told["changed"] == 6 and len(told["failures"]) == 2
    assert told["tensors"][1]["largest"] == "inf" and told["tensors"][0]["changed"] == 5
    assert told["limits"] == {"share": 0.06, "rms": None, "largest": None, "kl": 1}
    assert deltas.audit(base, deltas.diff(base, base)).text().endswith("passed: 0 entries change.")


def test_kl_is_that_of_the_distributions(key):
    base = init(CFG, key)
    new = jax.tree.map(lambda x: x * 1.1, base)
    rows = np.array([[1, 4, 5, 6, 7], [1, 8, 9, -1, -1]], np.int32)
    kl = deltas.lm_kl(CFG, rows)
    got = kl(base, new)

    @jax.jit
    def logits(params):
        at = jnp.broadcast_to(jnp.arange(5), (2, 5))
        hidden, _ = apply(CFG, params, jnp.maximum(rows, 0), at, jnp.ones_like(at))
        return unembed(CFG, params, hidden)

    old, tuned = (np.asarray(logits(params), np.float64) for params in (base, new))
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (old, tuned))
    each = (p * np.log(p / q)).sum(-1)
    total, count = each[0].sum() + each[1, :3].sum(), 8
    assert total / count > 1e-3
    assert got == pytest.approx(total / count, rel=1e-4)
    assert kl(base, base) == 0
    for bad, message in ((rows * 0 - 1, "no token"), (rows + 10, "token 19; the model has 11")):
        with pytest.raises(ValueError, match=message):
            deltas.lm_kl(CFG, bad)
    with pytest.raises(ValueError, match="head='value'"):
        deltas.lm_kl(CFG.replace(head="value"), rows)
