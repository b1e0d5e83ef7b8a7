"""Rows whose tokens are split over devices: no algorithm's parameters show it."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest
from test_plan_law import check, models_after

from jaxrl_eff import core
from jaxrl_eff.models import LMConfig, attention, logical_axes, params
from jaxrl_eff.parallel import Network, Placement
from jaxrl_eff.parallel.attention import kernels, sequence
from jaxrl_eff.parallel.attention.context import (
    Mask,
    SequenceLayout,
    current_layout,
    sequence_layout,
)
from jaxrl_eff.train import assembly

ALGORITHMS = ("sft", "reward_model", "dpo", "ppo", "grpo")
FEW = ("dpo", "ppo")  # between them every loss: likelihood, pairs, values, ratios


@functools.cache
def on_one_device(algorithm):
    return models_after(run(algorithm, devices=[0]))


def run(algorithm, **place):
    plan = f"{algorithm}.plan={{'default': {place!r}}}"
    return assembly.assemble(launch.config(f"algorithm={algorithm},optim=sgd", plan))


@pytest.mark.parametrize(
    "algorithm", [a if a in FEW else pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS]
)
def test_tokens_over_devices_give_the_same_parameters(algorithm):
    got = models_after(run(algorithm, devices=[3, 0, 2, 1], data=2, seq=2))
    check(got, on_one_device(algorithm))


@pytest.mark.parametrize("window", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_window_of_all_layers_sends_keys_no_farther_than_it_reaches(window, monkeypatch):
    """A device has two tokens of a row or more: 3 positions reach one piece back, 30 all."""

    def step(**place):
        shape = (f"model.shape.window={window}", "export=false")  # llama's files have no window
        plan = f"dpo.plan={{'default': {place!r}}}"
        return assembly.assemble(launch.config("algorithm=dpo,optim=sgd", plan, *shape))

    want = models_after(step(devices=[0]))
    real, reaches = sequence.attend, set()
    monkeypatch.setattr(
        sequence, "attend", lambda *a, **how: reaches.add(how.get("reach")) or real(*a, **how)
    )
    check(models_after(step(devices=[3, 0, 2, 1], seq=4)), want)
    assert reaches == ({1} if window == 3 else {None})


def test_a_call_takes_the_ring_and_gathers_no_hidden_states():
    lm = LMConfig(vocab=40, layers=2, width=48, heads=2, kv_heads=1, head_dim=16, ffn=64, unroll=1)
    spec = core.Spec(params.abstract(lm), logical_axes(lm))
    seen = []

    def fn(p, batch, key):
        over = current_layout(batch["tokens"].shape[1])
        seen.append(over.attend)
        from jaxrl_eff.models import heads

        row = (batch[k] for k in ("tokens", "position", "segment"))
        return {"logp": heads.token_logprobs(lm, p, *row, with_entropy=False)[0]}

    call = core.infer("inf", of="m", fn=fn, reads="tokens position segment", writes="logp")
    graph = core.Graph("tokens position segment", (call,))
    place = Placement((0, 1, 2, 3), seq=4)
    step = core.compile(graph, {"inf": place}, {"m": spec})
    shape = jax.ShapeDtypeStruct((2, 2048), np.int32)  # long enough for a ring to be best
    step.build(dict.fromkeys(("tokens", "position", "segment"), shape))
    assert seen == [sequence.attend(place)]
    text = step.program("inf").as_text()
    count = collections.Counter(re.findall(r"(collective-permute|all-to-all)\(", text))
    assert count["collective-permute"] >= 1
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]\S* all-gather\(", text):
        size = np.prod([int(n) for n in dims.split(",")])
        assert kind == "s32" or size <= 2 * 2048, (kind, dims)  # one number a token at most


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "rate", "way"),
    [
        (512, 32, 8, 400e9, "gathered"),  # messages are too small for a ring
        (262_144, 14, 2, 400e9, "ring"),  # 14 heads do not divide by 8; compute hides the wire
        (16_384, 64, 64, 45e9, "ulysses"),  # as many key heads as query heads on a slow wire
    ],
)
def test_the_way_that_is_estimated_fastest_is_taken(length, heads, kv_heads, rate, way):
    place, network = Placement(tuple(range(8)), seq=8), Network((0,) * 8, link_bytes_per_s=rate)
    shape = (1, length, heads, 128)
    got = sequence.fastest(
        place, shape, kv_heads, jnp.bfloat16, network=network, flops_per_s=500e12
    )
    assert got == way


@pytest.mark.slow
def test_whole_rows_attended_to_as_on_a_tpu_give_the_same_parameters(monkeypatch):
    want = on_one_device("ppo")
    monkeypatch.setattr(sequence, "for_whole_rows", lambda: True)
    made = []
    real = sequence.attend
    monkeypatch.setattr(sequence, "attend", lambda *a: made.append(a) or real(*a))
    check(models_after(run("ppo", devices=[3, 0, 2, 1], data=2, fsdp=2)), want)
    assert made


def layout_for(lm):
    return current_layout(4, sight=lm.sight, head_dim=lm.head_dim, dtype=lm.dtype)


def test_whole_rows_on_a_gpu_are_for_the_kernel_if_it_takes_the_model(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sequence.for_whole_rows()
    for kernel, whole in ((kernels.xla(), False), (kernels.TRITON, True)):
        monkeypatch.setattr(kernels, "best", lambda *_, kernel=kernel: kernel)
        assert sequence.fits_whole_rows(64, "bfloat16") == whole
    monkeypatch.setattr(kernels, "best", None)  # others must not make it try a kernel
    assert not sequence.fits_whole_rows(80, "bfloat16")  # no power of two
    assert not sequence.fits_whole_rows(64, "float32")
    lm = LMConfig(vocab=8, layers=1, width=8, heads=1, kv_heads=1, head_dim=64, ffn=8)
    over = SequenceLayout(attention.plain, fits=sequence.fits_whole_rows)
    with sequence_layout(lambda length, sight: over):
        assert layout_for(lm).attend is None
        monkeypatch.setattr(kernels, "best", lambda *_: kernels.TRITON)
        assert layout_for(lm.replace(dtype="bfloat16")).attend is attention.plain


@pytest.mark.parametrize("way", ["ring", "gathered", "ulysses"])
def test_own_and_shared_tokens_by_any_way_are_two_attentions(way):
    """Of 2 groups of 2 devices: 6 tokens of each device's own, and stripes of 8 of each group."""
    place, own, stripe = Placement((0, 1, 2, 3), data=2, seq=2), 6, 8
    rng, scale = np.random.default_rng(0), 0.5
    of_own, of_shared = (
        [jnp.asarray(rng.normal(size=(rows, length, n, 8)), jnp.float32) for n in (4, 2, 2)]
        for rows, length in ((4, own), (2, 2 * stripe))
    )
    at_own, at_shared = (
        (jnp.tile(jnp.arange(length), (rows, 1)), jnp.ones((rows, length), jnp.int32))
        for rows, length in ((4, own), (2, 2 * stripe))
    )

    def on(attend, arrays, at):
        position, segment = at
        return attend(*arrays, Mask(position, segment, position, segment), scale=scale)

    def joined(one, other):
        return jax.vmap(lambda a, b: sequence.joined(a, b, 2), (2, 2), 2)(
            *(x.reshape(*x.shape[:2], -1) for x in (one, other))
        ).reshape(4, own + stripe, *one.shape[2:])

    arrays = [joined(a, b) for a, b in zip(of_own, of_shared, strict=True)]
    at = [sequence.joined(a, b, 2) for a, b in zip(at_own, at_shared, strict=True)]
    got = jax.jit(lambda arrays, at: on(sequence.both(place, own, way), arrays, at))(arrays, at)
    want = joined(on(attention.plain, of_own, at_own), on(attention.plain, of_shared, at_shared))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    program = jax.jit(lambda arrays, at: on(sequence.both(place, own, way), arrays, at))
    text = program.lower(arrays, at).compile().as_text()
    sent = {"ring": "collective-permute(", "gathered": "all-gather(", "ulysses": "all-to-all("}
    assert sent[way] in text


def test_chunks_on_cpus_are_short():
    q, at = jnp.zeros((1, 512, 2, 8)), jnp.zeros((1, 512), jnp.int32)
    attend = sequence.attend(Placement((0, 1), seq=2), "ring")
    mask = Mask(at, at, at, at)
    text = str(jax.make_jaxpr(lambda q: attend(q, q, q, mask, scale=1.0))(q))
    assert f"f32[2,1,2,{sequence.CPU_CHUNK},8]" in text  # two chunks a device


def test_what_is_striped_comes_back():
    x = jax.random.normal(jax.random.key(0), (3, 24))
    there = sequence.striped(x, 4)
    np.testing.assert_array_equal(there[:, :6], x[:, ::4])
    np.testing.assert_array_equal(sequence.unstriped(there, 4), x)
    with pytest.raises(ValueError, match="'star'; expected one of"):
        sequence.attend(Placement((0, 1), seq=2), "star")
