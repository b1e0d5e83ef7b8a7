"""Kills runs at random and chosen moments, starts them again, and compares what they end with.

  python experiments/reliability/kills.py --kills=200 --minutes=60

Every run of a trial is started as the command is, in a fork of this process, which has done the
imports already, so that a run takes seconds. It is killed at a moment that is drawn (`Moment`),
started again with the same command, killed again, ..., and at last left alone. Then every byte that
it exported, every number that it measured, its samples and documents, and every array of its last
checkpoint must be those of a run that was never killed. One line a kill goes to kills.jsonl, one
line a trial to trials.jsonl, in --out.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Functions at whose calls a run is killed: in all of its phases, and all around a save.
PLACES = (
    "jaxrl_eff.train.workdir:Lock.take", "jaxrl_eff.train.assembly:assemble",
    "jaxrl_eff.train.state:initial", "jaxrl_eff.train.state:shelve",
    "jaxrl_eff.train.writer:Writer.step", "jaxrl_eff.train.writer:Writer.samples",
    "jaxrl_eff.train.writer:Writer.document", "jaxrl_eff.checkpoints.run:Checkpoints.save",
    "jaxrl_eff.checkpoints.run:Checkpoints._begin", "jaxrl_eff.checkpoints.run:_crc",
    "jaxrl_eff.checkpoints.manifest:lacking", "jaxrl_eff.checkpoints.manifest:write",
    "jaxrl_eff.checkpoints.run:Checkpoints._adopt",
    "jaxrl_eff.checkpoints.run:Checkpoints._rotate",
    "jaxrl_eff.checkpoints.run:Checkpoints._delete", "jaxrl_eff.checkpoints.run:Checkpoints.note",
    "jaxrl_eff.files:write", "jaxrl_eff.train.export:write", "jaxrl_eff.checkpoints.hf_save:_swap",
    "jaxrl_eff.cli.report:write", "jaxrl_eff.train.workdir:Lock.release", "os:replace",
    "os:rename", "shutil:rmtree",
)  # fmt: skip
# Those that a run reaches soon after it was started again: a second kill in a row.
EARLY = (
    "jaxrl_eff.train.workdir:Lock.take", "jaxrl_eff.train.assembly:assemble",
    "jaxrl_eff.files:write", "jaxrl_eff.checkpoints.run:Checkpoints.peek",
    "jaxrl_eff.checkpoints.run:Checkpoints.restore", "jaxrl_eff.checkpoints.stored:load",
    "jaxrl_eff.train.writer:Writer.document", "os:replace",
)  # fmt: skip
# Stages, so that models, optimizers, data and coefficients go from one to the next; an adapter, so
# that checkpoints share the part that does not change.
TASKS = {
    "three stages": ("tests/tiny.py:algorithm=three,steps=3,every=1,evaluate=1",),
    "sft": ("tests/tiny.py:algorithm=sft,steps=6,every=1",),
    "dpo": ("tests/tiny.py:algorithm=dpo,steps=4,every=1",),
    "grpo": ("tests/tiny.py:algorithm=grpo,steps=4,every=1,evaluate=1",),
    "lora": (
        "tests/tiny.py:algorithm=sft,steps=5,every=1",
        "--config.sft.adapt={'actor': {'name': 'lora', 'rank': 4}}",
    ),
}
NOT_COMPARED = ("time", "seconds", "tokens_per_s", "flops_per_s", "mfu")


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    Attributes:
        kind: "planted" (at a call), "random" (after a share of a run's time), "again" (planted soon
            after the start).
        place: MODULE:NAME of the function called.
        when: "before" or "after" the call.
        count: which call, from 1.
        share: of the time of a run that was not killed.
        signal: its name.
    """

    kind: str
    place: str = ""
    when: str = ""
    count: int = 0
    share: float = 0.0
    signal: str = "SIGKILL"


def watch(place: str, seen: Any) -> None:
    """Calls `seen("before" | "after")` around each call of a function of this process."""
    module, name = place.split(":")
    owner = importlib.import_module(module)
    *way, last = name.split(".")
    for part in way:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen("before")
        out = original(*args, **kwargs)
        seen("after")
        return out

    setattr(owner, last, watched)


def plant(moment: Moment) -> None:
    """Makes this process kill itself."""
    calls = {"before": 0, "after": 0}

    def seen(when: str) -> None:
        calls[when] += 1
        if when == moment.when and calls[when] == moment.count:
            os.kill(os.getpid(), signal.Signals[moment.signal])

    watch(moment.place, seen)


def count_calls(path: Path) -> None:
    """Writes how often each place was called, at every call, into a file."""
    calls = dict.fromkeys((*PLACES, *EARLY), 0)
    write = os.write
    for place in calls:

        def seen(when: str, place: str = place) -> None:
            if when == "before":
                calls[place] += 1
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                write(descriptor, json.dumps(calls).encode())
                os.close(descriptor)

        watch(place, seen)


def imported() -> None:
    """Imports what a run needs; starts nothing, since threads do not outlive a fork."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["NPROC"] = "32"
    os.environ["GLIBC_TUNABLES"] = ""
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    for name in (
        "main", "cli.report", "checkpoints.stored", "checkpoints.peft_files", "train.assembly",
        "train.loop", "train.export", "train.summary", "train.workdir", "train.console",
    ):  # fmt: skip
        importlib.import_module(f"jaxrl_eff.{name}")
    for name in ("orbax.checkpoint", "tensorboardX", "tensorboardX.summary", "grain.python"):
        importlib.import_module(name)


def start(task: str, workdir: Path, prepare: Any, flags: tuple[str, ...] = ()) -> int:
    """Forks a run; returns its process. Its output is appended to WORKDIR.txt."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        out = os.open(f"{workdir}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        config, *changes = TASKS[task]
        sys.argv = ["main", f"--config={config}", *changes, f"--workdir={workdir}", *flags]
        prepare()
        from absl import app

        from jaxrl_eff import main

        try:
            app.run(main.main, flags_parser=main._parse)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def ended(process: int, limit_s: float) -> int | None:
    """Exit code of a process (negative: the signal), or None if it still runs after the limit."""
    end = time.monotonic() + limit_s
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


def run(task: str, workdir: Path, moment: Moment | None, seconds: float, processes: int) -> list:
    """Runs the command once, killed at a moment; exit codes of all processes.

    Of several processes a planted moment is the first one's, and a random one is that of a process
    that is drawn; the others are killed shortly after, as a scheduler does.
    """
    flags: list[tuple[str, ...]] = [()]
    if processes > 1:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        flags = [
            (f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={i}")
            for i in range(processes)
        ]
    planted = moment is not None and moment.place

    def prepare(first: bool) -> None:
        if planted and first:
            plant(moment)

    started = [
        start(task, workdir, lambda i=i: prepare(i == 0), mine) for i, mine in enumerate(flags)
    ]
    codes: list[int | None] = [None] * len(started)
    if moment is not None and not planted:
        victim = random.randrange(len(started))
        codes[victim] = ended(started[victim], moment.share * seconds)
        if codes[victim] is None:
            os.kill(started[victim], signal.Signals[moment.signal])
    gone = None
    limit = time.monotonic() + 20 * seconds + 120
    while None in codes:
        for i, process in enumerate(started):
            if codes[i] is None:
                codes[i] = ended(process, 0.02)
        if gone is None and any(c not in (None, 0) for c in codes):
            gone = time.monotonic() + random.uniform(0, 1)
        if time.monotonic() > min(limit, gone or limit):
            for i, process in enumerate(started):
                if codes[i] is None:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    codes[i] = -9 if gone else 124
    return codes


def outcome(workdir: Path) -> dict[str, Any]:
    """Everything that a run ends with, but for times and names that are drawn."""
    import tensorstore as ts

    found: dict[str, Any] = {}
    for folder in ("export", "adapter", "base"):
        for path in sorted((workdir / folder).rglob("*")):
            if path.is_file():
                found[str(path.relative_to(workdir))] = path.read_bytes().replace(
                    str(workdir).encode(), b"WORKDIR"
                )
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in rows]
    for name in ("samples.jsonl", "config.json", "plan.json"):
        found[name] = (workdir / name).read_text()
    result = json.loads((workdir / "result.json").read_text())
    found["result"] = {k: result[k] for k in ("results", "passed")}
    newest = max(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    record = json.loads((newest / "record.json").read_text())
    found["record"] = {k: record[k] for k in ("step", "leaves", "record", "fingerprint")}
    arrays = {}
    for part in ("state", "still"):
        if (newest / part).is_dir():
            base = {"driver": "file", "path": f"{newest / part}/"}
            store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
            arrays |= {key: bytes(store[key]) for key in store.list().result()}
    found["arrays"] = arrays
    found["strangers"] = sorted(
        p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()
    )
    return found


def differences(workdir: Path, whole: Path) -> list[str]:
    """Names of what two runs end with differently; looked at in a fork."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            ours, theirs = outcome(workdir), outcome(whole)
            names = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
        except BaseException as error:
            names = [f"{type(error).__name__}: {error}"]
        os.write(writing, json.dumps(names)[:60000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    return json.loads(text)


def drawn(rng: random.Random, calls: dict[str, int], again: bool, done: int) -> Moment:
    """A moment; `again`: soon after a start. After `done` kills less of the run is left."""
    if again:
        place = rng.choice(EARLY)
        return Moment("again", place, rng.choice(("before", "after")), rng.randint(1, 2))
    name = "SIGTERM" if rng.random() < 0.15 else "SIGKILL"
    if rng.random() < 0.4:
        return Moment("random", share=rng.uniform(0.05, 1.0), signal=name)
    place = rng.choice([p for p in PLACES if calls.get(p)])
    when = rng.choice(("before", "after"))
    count = rng.randint(1, max(1, calls[place] // (1 + done // 2)))
    return Moment("planted", place, when, count, signal=name)


def reference(task: str, folder: Path, processes: int) -> tuple[Path, float, dict[str, int]]:
    """A run that is never killed: its directory, its seconds, and calls of each place."""
    whole, calls = folder / f"whole {task} {processes}", folder / f"calls {task}.json"
    if not calls.exists():
        process = start(task, folder / f"counted {task}", lambda: count_calls(calls))
        ended(process, 1200.0)
    if processes > 1:  # compiles; above, that was done
        run(task, folder / f"warm {task}", None, 600.0, processes)
    began = time.monotonic()
    codes = run(task, whole, None, 600.0, processes)
    if any(codes):
        raise SystemExit(f"{task} on {processes} processes ends with {codes}; see {whole}.txt")
    return whole, time.monotonic() - began, json.loads(calls.read_text())


def trial(
    task: str, processes: int, known: tuple[Path, float, dict[str, int]], workdir: Path,
    kills: int, rng: random.Random, log: Any,
) -> tuple[int, list[str]]:  # fmt: skip
    """A run that is killed and started again; kills, and what it ends with differently."""
    whole, seconds, calls = known
    done, again = 0, False
    for _ in range(3 * kills):
        if done == kills:
            break
        moment = drawn(rng, calls, again, done)
        codes = run(task, workdir, moment, seconds, processes)
        if not any(codes) and (moment.signal == "SIGKILL" or (workdir / "result.json").exists()):
            continue  # it ended before that moment; a run that has ended may be started again
        # A SIGTERM that nobody listens to yet, or any more, ends a process as it does any.
        expected = (0, -15) if moment.signal == "SIGTERM" else (-9,)
        good = all(c in (*expected, *((-9, -6, -15, 1, 2) if processes > 1 else ())) for c in codes)
        log({"task": task, "processes": processes, **asdict(moment), "codes": codes, "good": good})
        if not good:
            return done, [f"exit codes {codes} at {moment}"]
        done, again = done + 1, not again and rng.random() < 0.4
    codes = run(task, workdir, None, seconds, processes)
    if any(codes):
        return done, [f"exit codes {codes} at the end"]
    return done, differences(workdir, whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many")
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no trial after these")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, with commas between")
    parser.add_argument("--two", type=float, default=0.15, help="share of trials of two processes")
    parser.add_argument("--each", type=int, default=8, help="kills a trial, at most")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="for the two files")
    args = parser.parse_args()
    imported()
    end, rng = time.monotonic() + 60 * args.minutes, random.Random(args.seed)
    random.seed(args.seed)
    folder, out = Path(tempfile.mkdtemp(prefix="kills ")), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    references: dict[tuple[str, int], Any] = {}
    total, bad, number, tasks = 0, 0, 0, args.tasks.split(",")
    with (
        open(out / "kills.jsonl", "a", encoding="utf-8") as kills,
        open(out / "trials.jsonl", "a", encoding="utf-8") as trials,
    ):
        while total < args.kills and time.monotonic() < end:
            task = tasks[number % len(tasks)]
            processes = 2 if rng.random() < args.two and task != "lora" else 1
            key = (task, processes)
            if key not in references:
                references[key] = reference(task, folder, processes)
            workdir = folder / f"trial {number}"
            wanted = min(rng.randint(3, args.each), args.kills - total)

            def log(row: dict[str, Any], number: int = number) -> None:
                kills.write(json.dumps({"trial": number, **row}) + "\n")
                kills.flush()

            done, names = trial(task, processes, references[key], workdir, wanted, rng, log)
            total, bad, number = total + done, bad + bool(names), number + 1
            row = {"trial": number - 1, "task": task, "processes": processes, "kills": done}
            trials.write(json.dumps({**row, "differences": names}) + "\n")
            trials.flush()
            print(f"{total} kills, {number} trials, {bad} of them bad; {row} {names}", flush=True)
            if not names:
                shutil.rmtree(workdir)
    print(f"{total} kills in {number} trials; {bad} trials ended differently; outputs in {folder}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
