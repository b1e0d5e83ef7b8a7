"""The command line: `python -m jaxrl_eff COMMAND ...` runs a command; without one, lists them."""

import importlib
import sys

COMMANDS = {
    "plan": "plan where each call of a config runs on a cluster, and predict how fast",
    "report": "draw the page of a run: curves, plan, timeline, samples",
    "generate": "print what a model answers, to a prompt or in a chat",
    "delta": "store what a fine-tune changed as a small file; apply, remove or add up such files",
    "balance": "show how batches of short and long sequences divide over a mesh",
    "needle": "measure how far back a model remembers",
    "doctor": "check the installation: versions, devices, speed, what is missing",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command named by the first argument, and returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return importlib.import_module(f"jaxrl_eff.cli.{name}").main(rest) or 0
    listed = "\n".join(f"  {word:10}{what}" for word, what in COMMANDS.items())
    if name in ("", "-h", "--help"):
        print(f"python -m jaxrl_eff COMMAND ...\n\n{listed}\n")
        print("python -m jaxrl_eff COMMAND --help explains one of them with an example.")
        print("To train: python -m jaxrl_eff.main --config=configs/quickstart.py --workdir=DIR")
        return 0
    print(f"error: unknown command {name!r}; expected one of {[*COMMANDS]}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
