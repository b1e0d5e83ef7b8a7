"""Distributed attention compiled for devices that are not there.

  python experiments/long_context/targets.py tpu v5e:2x4
  python experiments/long_context/targets.py cuda h100.txtpb

XLA compiles for a described topology without a device: for TPUs with the package `libtpu`, for
GPUs with JAX's CUDA plugin and a file that describes one (XLA's `GpuTargetConfigProto` as text).
That shows that kernels compile, what a send may hide behind, and how much memory is used; nothing
runs. Forward and backward pass of one layer, bfloat16, Qwen2.5-7B's heads, one document a row over
8 devices in stripes.
"""

import argparse
import contextlib
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_eff.parallel.attention import kernels, ring
from jaxrl_eff.parallel.attention.context import Mask
from jaxrl_eff.parallel.attention.on_mesh import on_mesh

HEADS, KV_HEADS, PARTS = 28, 4, 8
LENGTHS = (8_192, 32_768, 131_072)
KERNELS = {"tpu": kernels.MOSAIC, "cuda": kernels.TRITON}


def devices(platform: str, target: str) -> list:
    """Eight that are not there."""
    if platform == "tpu":
        described = topologies.get_topology_desc(platform="tpu", topology_name=target)
    else:
        with contextlib.suppress(RuntimeError):
            jax.devices("cuda")  # registers the plugin
        options = {"target_config": Path(target).read_text(), "topology": f"1x1x{PARTS}"}
        described = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
    return list(described.devices[:PARTS])


def compiled(platform: str, over: Mesh, length: int, dim: int, kernel: kernels.Kernel):
    pieces = NamedSharding(over, PartitionSpec(None, "seq"))

    def of(*shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=pieces)

    attend = on_mesh(ring.ring(kernel=kernel), over)

    def layer(q, k, v, dout, position, segment):
        def apply(q, k, v):
            return attend(q, k, v, Mask(position, segment, position, segment), scale=dim**-0.5)

        out, pull = jax.vjp(apply, q, k, v)
        return out, *pull(dout)

    q, k, at = of(HEADS, dim), of(KV_HEADS, dim), of(dtype=jnp.int32)
    traced = jax.jit(layer).trace(q, k, k, q, at, at)
    return traced.lower(lowering_platforms=(platform,)).compile()


def apart(text: str) -> list[int]:
    """Of every send, how many kernels or loops over chunks stand between its start and its end."""
    waiting, found = {}, []
    for line in text.splitlines():
        if start := re.search(r"%(\S*collective-permute-start\S*) = ", line):
            waiting[start[1]] = 0
        elif done := re.search(r"collective-permute-done\(%?(\S+?)\)", line):
            found.append(waiting.pop(done[1].rstrip(","), -1))
        elif " while(" in line or ("ring_" in line and "custom-call" in line):
            waiting = {k: n + 1 for k, n in waiting.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("platform", choices=KERNELS)
    parser.add_argument("target")
    parser.add_argument("--head_dim", type=int, default=128)
    args = parser.parse_args()
    there = devices(args.platform, args.target)
    jax.devices = lambda *_: there  # which a kernel asks for their shared memory
    over = Mesh(np.array(there), ("seq",))
    print(f"{PARTS} x {over.devices.flat[0].device_kind}")
    for length in LENGTHS:
        for kernel in (KERNELS[args.platform], kernels.xla()):
            began = time.perf_counter()
            program = compiled(args.platform, over, length, args.head_dim, kernel)
            text, memory = program.as_text(), program.memory_analysis()
            print(
                f"{length:>7} tokens, {kernel.name:>6}: temporary "
                f"{memory.temp_size_in_bytes / 1e6:,.0f} MB, arguments "
                f"{memory.argument_size_in_bytes / 1e6:,.0f} MB, "
                f"computations between the start and end of each send {apart(text)}, "
                f"compiled in {time.perf_counter() - began:.1f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
