"""The package's files whose functions run between the start of a run and the end of its first step.

  python experiments/house/files.py --algorithm=sft
  python experiments/house/files.py --algorithm=grpo --checkout=DIR     # of another version

Runs `tests/tiny.py` of a checkout in this process. A module's own statements, run by an import, do
not count, only calls of functions. The model, optimizers and what prints count as one file each.
"""

import argparse
import collections
import importlib
import os
import sys
import tempfile
import threading
from pathlib import Path

ONE = ("models", "optim", "console")


class Ended(BaseException):
    """The first step is logged."""


def group(path: Path) -> str:
    """The file's name, or the room that counts as one."""
    parts = path.with_suffix("").parts
    return next((p for p in parts if p in ONE), str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--algorithm", default="sft", help="of tests/tiny.py")
    parser.add_argument("--checkout", default=str(Path(__file__).parents[2]), help="of the package")
    args = parser.parse_args()
    root = Path(args.checkout).resolve()
    sys.path[:0] = [str(root), str(root / "tests")]
    os.chdir(root)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("NPROC", "32")
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    from jaxrl_eff import main as entry

    try:
        from jaxrl_eff.train import config_file, settings, writer
    except ImportError:  # before the rooms
        from jaxrl_eff import arguments as config_file
        from jaxrl_eff import metrics as writer
        from jaxrl_eff import settings
    spec = f"tests/tiny.py:algorithm={args.algorithm},steps=2,devices=2"
    run = settings.run(config_file.load(spec, ()))
    for path in sorted((root / "jaxrl_eff").rglob("*.py")):  # or the bodies of classes would count
        if path.stem != "__main__" and "worker" not in path.stem:
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            importlib.import_module(name.removesuffix(".__init__"))
    package, seen = str(root / "jaxrl_eff") + os.sep, collections.Counter()

    def called(frame, event, arg):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(package) and frame.f_code.co_name != "<module>":
            seen[name] += 1

    step = writer.Writer.step

    def last(self, *values, **more):
        step(self, *values, **more)
        raise Ended

    writer.Writer.step = last
    threading.setprofile(called)
    sys.setprofile(called)
    try:
        with tempfile.TemporaryDirectory() as workdir:
            entry.train(run, Path(workdir), quiet=True)
    except Ended:
        pass
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = collections.Counter()
    for name, count in seen.items():
        files[group(Path(name).relative_to(root / "jaxrl_eff"))] += count
    for name in sorted(files):
        print(name)
    print(f"{len(files)} files for {args.algorithm}")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
