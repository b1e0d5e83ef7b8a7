"""Runs this package and its peers on the same work, interleaved, and prints the ratios.

  PEERS=DIR PEERS_PYTHON=PATH python experiments/peers/run.py --rounds=3 [--work grpo sft ...]

PEERS is a folder with the peers' scripts (`tunix_grpo.py`, `trl_sft.py`, ...), each of which prints
one line `RESULT {json}` with `median_step_s`, and with `tiny_llama/`, the common model. Every run
is a process of its own, pinned to one core (`--core`) with one thread; grpo_disagg has eight
simulated devices and all cores. The order is rotated from round to round, so that a neighbour's
load falls on everyone. Results go to `--out`, a line a run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RIVALS = {
    "grpo": ("tunix_grpo.py", "trl_grpo.py"),
    "sft": ("tunix_sft.py", "trl_sft.py"),
    "dpo": ("tunix_dpo.py", "trl_dpo.py"),
    "generate": ("tunix_generate.py", "hf_generate.py"),
    "grpo_disagg": ("tunix_grpo_disagg.py",),
}
# JAX 0.10.2 deadlocks with more simulated devices than cores unless NPROC is set.
EIGHT = {"NPROC": "32", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def measure(work: str, command: list[str], folder: Path, core: int, steps: int) -> dict | None:
    """One process: its RESULT, or None if it printed none."""
    env = {**os.environ, "STEPS": str(steps), "REPS": str(steps)}
    env["MODEL"] = str(Path(os.environ["PEERS"]) / "tiny_llama")
    if work == "grpo_disagg":
        env |= EIGHT
    else:
        env |= dict.fromkeys(("THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = ["taskset", "-c", str(core), *command]
    done = subprocess.run(
        command,
        cwd=folder, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(lines[-1][6:]) if lines else None


def matmul(core: int) -> float:
    """GFLOP/s of [2048, 256] x [256, 688] in float32 on the core, now."""
    code = (
        "import os; os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        "import time, jax, jax.numpy as jnp\n"
        "a, b = jnp.ones((2048, 256)), jnp.ones((256, 688)); f = jax.jit(lambda a, b: a @ b)\n"
        "f(a, b).block_until_ready(); best = 9\n"
        "for _ in range(40):\n"
        "    t = time.perf_counter(); f(a, b).block_until_ready()\n"
        "    best = min(best, time.perf_counter() - t)\n"
        "print(2 * 2048 * 256 * 688 / best / 1e9)\n"
    )
    done = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--work", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    args = parser.parse_args()
    for name in ("PEERS", "PEERS_PYTHON"):
        if name not in os.environ:
            sys.exit(f"error: set {name}; see {Path(__file__).name}'s first lines.")
    peers, python = Path(os.environ["PEERS"]), os.environ["PEERS_PYTHON"]
    times: dict[tuple[str, str], list[float]] = {}
    with args.out.open("a") as out:
        for r in range(args.rounds):
            rate = matmul(args.core)
            for work in args.work:
                runs = [("ours", [sys.executable, str(HERE / "ours.py"), work], HERE)]
                runs += [(s, [python, s], peers) for s in RIVALS[work] if (peers / s).is_file()]
                for name, command, folder in runs[r % len(runs) :] + runs[: r % len(runs)]:
                    load = os.getloadavg()[0]
                    result = measure(work, command, folder, args.core, args.steps)
                    row = {"work": work, "name": name, "round": r, "load": load}
                    row |= {"matmul_gflops": round(rate, 1), "result": result}
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    if result is not None:
                        times.setdefault((work, name), []).append(result["median_step_s"])
                    print(work, name, result and result["median_step_s"], flush=True)
    print(f"\n| work | run | median of {args.rounds} rounds, s | over ours |\n|---|---|---|---|")
    for (work, name), seconds in times.items():
        ratio = statistics.median(seconds) / statistics.median(times[work, "ours"])
        print(f"| {work} | {name} | {statistics.median(seconds):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
