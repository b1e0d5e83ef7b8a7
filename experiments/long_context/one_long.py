r"""One training step on a single sequence of 131,072 tokens, spread over 8 simulated devices.

  NPROC=32 python experiments/long_context/one_long.py [--tokens=131072]

Prints the loss and the gradient's norm over 8 devices by a ring and on one device in chunks, their
differences, and the memory that the compiled programs need on a device.
"""

import argparse
import os
import time

os.environ.setdefault("NPROC", "32")

from jaxrl_eff.parallel import host

host.simulate(8)

import jax
import numpy as np
import optax

from jaxrl_eff import core
from jaxrl_eff.algorithms import sft
from jaxrl_eff.core import Placement, Spec
from jaxrl_eff.models import LMConfig, logical_axes, params
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.parallel.attention.context import SequenceLayout, sequence_layout

LM = LMConfig(
    vocab=256, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, ffn=64, unroll=1,
    remat="outputs", max_length=1 << 17,
)  # fmt: skip


def step_of(place: Placement, batch: dict[str, np.ndarray]) -> core.Step:
    graph = sft.graph(sft.SFTConfig(), {"actor": LM})
    if place.seq == 1:  # in chunks on one device, too
        (call,) = graph.calls
        chunks = SequenceLayout(sequence.attend(place))

        def forward(*args):
            with sequence_layout(lambda length, sight=None: chunks):
                return call.forward(*args)

        again = core.train(
            call.name, of=call.of, forward=forward, loss=call.loss, reads=" ".join(call.reads)
        )
        graph = core.Graph(graph.inputs, (again,))
    spec = Spec(params.abstract(LM), logical_axes(LM), optax.sgd(0.1))
    return core.compile(graph, {"actor_train": place}, {"actor": spec}).build(batch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1 << 17)
    n = parser.parse_args().tokens
    rng = np.random.default_rng(0)
    row = np.ones((1, n), np.int32)
    batch = {
        "tokens": rng.integers(0, LM.vocab, (1, n)).astype(np.int32),
        "segment": row,
        "position": np.arange(n, dtype=np.int32)[None],
        "mask": row.astype(np.float32),
    }
    found = {}
    places = {
        "8 devices": Placement(tuple(range(8)), seq=8),
        "one device": Placement((0,)),
    }
    for name, place in places.items():
        step = step_of(place, batch)
        where = jax.tree.map(lambda x: x.sharding, step.home("actor").params)
        start = jax.jit(lambda k: params.init(LM, k), out_shardings=where)(jax.random.key(0))
        began = time.perf_counter()
        _, _, m = step({"actor": step.init("actor", start)}, batch, np.array([0, 0], np.uint32))
        found[name] = [float(m[f"actor_train/{k}"]) for k in ("loss", "grad_norm")]
        memory = step.analysis()["actor_train"]["bytes"] / 1e6
        print(
            f"{name:11} loss {found[name][0]:.7f}  gradient {found[name][1]:.6f}  "
            f"{time.perf_counter() - began:7.1f} s  {memory:8.1f} MB a device",
            flush=True,
        )
    for what, a, b in zip(("loss", "gradient"), *found.values(), strict=True):
        print(f"{what}: relative difference {abs(a - b) / abs(b):.1e}")


if __name__ == "__main__":
    main()
