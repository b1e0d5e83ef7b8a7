"""Draws the page of a run: DIR/report.html, one file that needs no network.

  python -m jaxrl_eff report runs/quickstart

The page shows the result, curves of all metrics, the plan, the calls of one step over time, samples
and the config. It is drawn from the files that a run writes into its workdir. What is missing is
named on the page, so a run that is still going, or was cut short, has a report too.
"""

from pathlib import Path

from jaxrl_eff import files
from jaxrl_eff.cli import parser
from jaxrl_eff.cli.pages import run


def write(workdir: str | Path) -> Path:
    """Draws the report of a run and returns its path.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: the directory holds nothing that a run writes.
    """
    path = Path(workdir) / "report.html"
    files.write(path, run.draw(Path(workdir)))
    return path


def main(argv: list[str] | None = None) -> int:
    """Writes the report; returns the exit status."""
    words = parser.command("report", __doc__)
    words.add_argument("workdir", help="the directory of a run")
    return words.run(argv, lambda options: print(write(options.workdir)))
