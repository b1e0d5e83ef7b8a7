"""Command line: `python -m jaxrl_eff NAME ...` runs a command; without a name, lists them."""

import importlib
import sys

COMMANDS = {
    "plan": "where each call of a config would run on a cluster, and how fast",
    "report": "a run's directory as one page",
    "generate": "what a model says, token by token",
    "delta": "what a fine-tune changed, as a small file: diff, apply, remove, audit, compose",
    "balance": "how batches of mixed lengths divide over a mesh, and what that gains",
    "needle": "how far back a model remembers",
    "doctor": "versions, devices, measured rates, what is missing",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command named by the first argument, and returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return importlib.import_module(f"jaxrl_eff.cli.{name}").main(rest) or 0
    listed = "\n".join(f"  {word:10}{what}" for word, what in COMMANDS.items())
    if name in ("", "-h", "--help"):
        print(f"python -m jaxrl_eff NAME ...\n\n{listed}\n")
        print("A run: python -m jaxrl_eff.main --config=FILE --workdir=DIR")
        return 0
    print(f"error: unknown command {name!r}; expected one of {[*COMMANDS]}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
