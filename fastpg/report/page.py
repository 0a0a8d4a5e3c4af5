"""The page: what it says of the runs, put into the template."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fastpg
from fastpg.report import tables
from fastpg.report.chart import Chart, draw
from fastpg.report.numbers import number
from fastpg.report.panels import REWARD, panels_of
from fastpg.report.run import ReportError, Run

FOLDER = Path(__file__).parent
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUM_COLORS = 8
"""So many runs have a color of their own; the letters tell the others apart."""

SMALL = (380, 220)
WIDE = (1140, 320)
"""Widths and heights of pictures: that of the reward is wide where the screen is."""

# XML and HTML have no place for these, escaped or not.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Pictures:
    """The curves: that of the reward in two widths, and the others."""

    reward_wide: Chart
    reward_small: Chart
    others: list[Chart]

    @property
    def has_evaluations(self) -> bool:
        """Whether there is a mark that needs explaining."""
        return any(curve.marks for curve in self.reward_wide.curves)


def write_page(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page about one or several runs.

    Args:
        directories: The directories of the runs, at least one.
        output: The file. None: `report.html` in the first directory.

    Returns:
        The file.

    Raises:
        ReportError: A directory holds no run or is given twice, or the file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from fastpg.report.page import write_page
        >>> write_page([Path("out/ppo"), Path("out/grpo")])  # doctest: +SKIP
        PosixPath('out/ppo/report.html')
    """
    whole = [directory.resolve() for directory in directories]
    for directory in directories:
        if whole.count(directory.resolve()) > 1:
            raise ReportError(f"{directory} is given twice.")
    page = render([Run.read(directory) for directory in directories])
    path = output or directories[0] / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"Cannot write {path}: {error.strerror}.") from error
    return path


def render(runs: Sequence[Run]) -> str:
    """Return the page about runs, as HTML."""
    # What users wrote is escaped wherever the template names it.
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    names = names_of(runs)
    letters = [_letter(i) for i in range(len(runs))] if len(runs) > 1 else [""]
    html = environment.get_template("page.html").render(
        runs=runs,
        names=names,
        letters=letters,
        num_colors=NUM_COLORS,
        pictures=_pictures(runs, names if len(runs) > 1 else [""], letters),
        tables=tables,
        number=number,
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        version=fastpg.__version__,
    )
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", html)


def _letter(index: int) -> str:
    """Return A to Z, then A2 to Z2, and so on."""
    turn, place = divmod(index, len(LETTERS))
    return LETTERS[place] + (str(turn + 1) if turn else "")


def _pictures(runs: Sequence[Run], names: Sequence[str], letters: Sequence[str]) -> Pictures:
    # A long name would take the room of the curves.
    short = all(len(name) <= 18 for name in names)
    return Pictures(
        draw(REWARD, runs, names if short else letters, *WIDE),
        draw(REWARD, runs, letters, *SMALL),
        [draw(panel, runs, letters, *SMALL) for panel in panels_of(runs)],
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return the shortest ends of the directories that tell the runs apart."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
