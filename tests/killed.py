"""The command, but the process is killed at a chosen moment.

  python tests/killed.py MODULE:NAME:WHEN:COUNT:SIGNAL --config=... --workdir=...

sends SIGNAL (KILL, TERM) before or after (WHEN) the COUNT-th call of a function or method, or that
for step N if COUNT is step=N.
"""

import importlib
import os
import runpy
import signal
import sys


def plant(moment):
    module, name, when, count, signal_ = moment.split(":")
    owner = importlib.import_module(module)
    *way, last = name.split(".")
    for part in way:
        owner = getattr(owner, part)
    original, seen = getattr(owner, last), [0]
    step = int(count.removeprefix("step=")) if count.startswith("step=") else None

    def watched(*args, **kwargs):
        seen[0] += 1
        now = args[1] == step if step is not None else seen[0] == int(count)
        if now and when == "before":
            os.kill(os.getpid(), signal.Signals[f"SIG{signal_}"])
        out = original(*args, **kwargs)
        if now and when == "after":
            os.kill(os.getpid(), signal.Signals[f"SIG{signal_}"])
        return out

    setattr(owner, last, watched)


if __name__ == "__main__":
    plant(sys.argv.pop(1))
    sys.path.insert(0, os.getcwd())
    os.environ.setdefault("NPROC", "32")
    runpy.run_module("jaxrl_eff.main", run_name="__main__", alter_sys=True)
