"""`python -m jaxrl_eff report DIR`: a run directory as one page, DIR/report.html.

The page holds everything it shows: curves, plan, the calls of a step over time, samples, config.
It reads what a run writes (metrics.jsonl, samples.jsonl, and result, plan, timeline and config as
.json), and says what is absent, so a run that was cut short has a report as well.
"""

from pathlib import Path

from jaxrl_eff import files
from jaxrl_eff.cli.pages import run
from jaxrl_eff.train import config_file


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
    parser = config_file.Parser(prog="python -m jaxrl_eff report", description=__doc__)
    parser.add_argument("workdir", help="directory of a run")
    options = parser.parse_args(argv)
    with config_file.explained():
        print(write(options.workdir))
    return 0
