"""The calls of a config, compiled for eight TPUs or GPUs that are not there.

  python experiments/long_context/whole.py tpu v5e:2x4 configs/sft.py [--KEY=VALUE ...]

See `targets`. The topology stands in for this machine's devices while the stage is assembled and
its calls are compiled. What is not compiled in: a vocabulary, whose size the config's tokenizer
says.
"""

import collections
import os
import re
import sys
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import targets

from jaxrl_eff.parallel.attention import kernels
from jaxrl_eff.train import assembly, config_file, settings

SENT = r" (collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("


def main() -> int:
    platform, target, config, *changes = sys.argv[1:]
    devices, kernel = targets.devices(platform, target), targets.KERNELS[platform]
    run = settings.run(config_file.load(config, [c.removeprefix("--") for c in changes]))
    as_if = {
        "devices": lambda *_: list(devices),
        "device_count": lambda *_: len(devices),
        "default_backend": lambda: {"tpu": "tpu", "cuda": "gpu"}[platform],
    }
    with (
        mock.patch.multiple(jax, **as_if),
        mock.patch.object(kernels, "best", lambda *_: kernel),  # cannot be tried here
    ):
        for stage in assembly.assemble(run).stages:
            began = time.perf_counter()
            stage.step.build(stage.batch)
            print(f"{stage.name}: compiled in {time.perf_counter() - began:.0f} s")
            for name, found in stage.step.analysis().items():
                text = stage.step.program(name).as_text()
                sent = dict(collections.Counter(re.findall(SENT, text)))
                calls = len(re.findall(r"tpu_custom_call|__gpu\$xla.gpu.triton", text))
                call, _, shape = name.partition(" ")
                print(
                    f"  {call} on {stage.step.plan[call]}{shape and ', micro-batches of '}{shape}"
                )
                print(f"    {found['bytes'] / 1e9:.2f} GB a device, {calls} kernels, {sent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
