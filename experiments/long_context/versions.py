r"""Seconds of a step of scheduled SFT in two checkouts of the package, which take turns.

  python experiments/long_context/versions.py --old=DIR
  python experiments/long_context/versions.py --old=DIR sft.data.length=4096 sft.schedule.room=1024

`configs/long_sft.py` from scratch on 8 simulated devices, 2 groups of 4. Each checkout has its own
process, which assembles, compiles and then waits for its turns. In a turn it does what a run does:
it starts a step, takes the next batch from the loader, and waits for the results.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONFIG = "configs/long_sft.py:seq=4"
CHANGES = (
    *("simulate_devices=8", "sft.schedule.room=512", "sft.schedule.shapes=4"),
    *("sft.schedule.measure=False", "sft.evaluate.problems=0"),
)
WARM = 3


def work(changes: list[str]) -> None:
    """Runs a step for every line of the standard input; prints its figures as a line of JSON."""
    from jaxrl_eff.parallel import host

    host.simulate(8)
    import jax

    from jaxrl_eff.train import assembly, config_file, settings, state

    assembled = assembly.assemble(settings.run(config_file.load(CONFIG, (*CHANGES, *changes))))
    (stage,) = assembled.stages
    began = time.perf_counter()
    step = stage.step.build(stage.batch)
    models = state.initial(assembled, stage, {})
    print(json.dumps({"compiled": time.perf_counter() - began}), flush=True)
    batch = next(stage.loader)
    for t, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        models, _, seen = step(models, batch, assembly.words(0, stage.name, t))
        started = time.perf_counter()
        batch = next(stage.loader)
        loaded = time.perf_counter()
        jax.block_until_ready((models, seen))
        done = time.perf_counter()
        row = {"seconds": done - wall, "starting": started - wall, "loading": loaded - started}
        row |= {"cpu": time.process_time() - cpu}
        row |= {k.rpartition("/")[2]: float(v) for k, v in seen.items()}
        print(json.dumps(row), flush=True)
    stage.loader.close()


def start(checkout: Path, changes: list[str]) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    env |= {"JAX_PLATFORMS": "cpu", "NPROC": "32", "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--work", *changes],
        cwd=checkout, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def turn(worker: subprocess.Popen) -> dict[str, float]:
    worker.stdin.write("step\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--old", type=Path, help="checkout of the other version")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args, changes = parser.parse_known_args()
    if args.work:
        work(changes)
        return
    places = {"old": args.old.resolve(), "new": Path(__file__).resolve().parents[2]}
    workers = {name: start(place, changes) for name, place in places.items()}
    for name, worker in workers.items():
        print(name, worker.stdout.readline().strip(), flush=True)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for t in range(WARM + args.steps):
        for name in ("old", "new") if t % 2 else ("new", "old"):
            row = turn(workers[name])
            if t >= WARM:
                rows[name].append(row)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    def spread(x: list[float]) -> str:
        low, middle, high = statistics.quantiles(x, n=4)
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    print(f"medians and quartiles of {args.steps} steps")
    for key in ("seconds", "starting", "loading", "cpu"):
        for name, found in rows.items():
            print(f"{name} {key:8} {spread([r[key] for r in found])}")
    for key in ("seconds", "cpu"):
        ratio = [b[key] / a[key] for a, b in zip(rows["old"], rows["new"], strict=True)]
        print(f"new / old {key:7} {spread(ratio)}")
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(rows["old"], rows["new"], strict=True)]
    print("losses differ by", *(f"{x:.1e}" for x in apart[:: max(1, args.steps // 8)]))


if __name__ == "__main__":
    main()
