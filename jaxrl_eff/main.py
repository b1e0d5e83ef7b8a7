r"""Trains a language model as a config says.

  python -m jaxrl_eff.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m jaxrl_eff.main --config=configs/grpo_gsm8k.py:model=DIR,data=DIR --config.grpo.steps=50

A config is a Python file; its docstring says what it trains and what came of it. Every value can be
changed on the command line (--config.a.b=c); --help together with --config lists the values. Run
the same command again to continue a run from its workdir. On clusters that JAX knows (SLURM, TPU
pods, ...) processes find each other; elsewhere give --coordinator, --processes and --process.

Exit codes: 0 done and the config's expectation met, or stopped by SIGTERM or Ctrl-C with everything
saved; 1 the expectation was missed, or a number was not finite; 2 any other error, in one line
(JAXRL_EFF_TRACEBACK=1 shows where); 130 Ctrl-C before there was anything to save.
"""

import dataclasses
import sys
import time
from pathlib import Path

from absl import app, flags, logging

from jaxrl_eff.parallel import host
from jaxrl_eff.train import config_file, interrupts, settings, startup
from jaxrl_eff.train.run import train
from jaxrl_eff.train.workdir import check_workdir

_CONFIG = flags.DEFINE_string("config", None, "The config to run: FILE.py or FILE.py:ARGUMENT.")
_CHANGES = flags.DEFINE_multi_string(config_file.FLAG, [], "Changes a value: --config.a.b=c.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run in it is continued.")
_QUIET = flags.DEFINE_bool("quiet", False, "Print only the final table and verdict.")
_ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Continue the run although its config or data changed."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0.")
_WAIT = flags.DEFINE_float("wait", startup.WAIT, "Seconds until a silent process is given up.")
# For the seconds of a whole run.
_BEGAN = time.perf_counter()


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # libraries say a lot at the level below
    interrupts.outlast_readers()
    if len(argv) > 1:
        config_file.fail(f"unknown arguments {argv[1:]}; flags begin with --, see --help.")
    for flag, example in ((_CONFIG, "configs/quickstart.py"), (_WORKDIR, "runs/first")):
        if not flag.value:
            config_file.fail(f"--{flag.name} is missing, e.g. --{flag.name}={example}; see --help.")
    with config_file.explained():
        run = settings.run(config_file.load(_CONFIG.value, _CHANGES.value))
        given = (f.value for f in (_COORDINATOR, _PROCESSES, _PROCESS, _WAIT))
        alike = {"--accept_changes": str(_ACCEPT_CHANGES.value)}
        with startup.started(run, startup.Processes(*given), alike):
            check_workdir(Path(_WORKDIR.value))
            startup.check_shared(Path(_WORKDIR.value))
            passed = train(
                run,
                Path(_WORKDIR.value),
                quiet=_QUIET.value,
                accept_changes=_ACCEPT_CHANGES.value,
                draw=_report,
                began=_BEGAN,
            )
    sys.exit(0 if passed else 1)


def _report(workdir: Path) -> Path:
    from jaxrl_eff.cli import report  # not needed before the end

    return report.write(workdir)


def _parse(argv: list[str]) -> list[str]:
    """Absl's parsing, after the config's own flags are made readable for it; and --help."""
    with config_file.explained():
        argv = config_file.rewrite(argv)
        if {"--help", "-help", "-h"} & set(argv):
            print(_help(argv))
            sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        config_file.fail(f"{' '.join(str(error).split())}; see --help.")


def _help(argv: list[str]) -> str:
    """Text of --help: the command, its flags, and the configs at hand or the values of one."""
    lines = [__doc__ or "", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        shown = f"--{flag.name}" if flag.name != config_file.FLAG else "--config.NAME"
        lines.append(f"  {shown:15} {flag.help}")
    spec = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "")
    if spec:
        run = dataclasses.asdict(settings.run(config_file.load(spec)))
        run |= run.pop("stage")
        return "\n".join(
            [*lines, "", f"Values of {spec}:", *map("  --{}".format, config_file.flat(run))]
        )
    return "\n".join([*lines, "", "Configs:", config_file.describe()])


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main, flags_parser=_parse)
