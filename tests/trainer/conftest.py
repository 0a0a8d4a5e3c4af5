"""The tests of the trainer train tiny models, hundreds of times."""

from pathlib import Path

import pytest

from fastpg.trainer.report import end_report


class Undrawn:
    """A plot that is written without being drawn."""

    def savefig(self, path, **_):
        """Writes a file of its name."""
        Path(path).write_bytes(b"undrawn")


@pytest.fixture(autouse=True)
def undrawn_plots(request, monkeypatch):
    """Leaves the plot of a run undrawn, a third of a tiny run's time; test_report draws it."""
    if request.module.__name__ != "test_report":
        monkeypatch.setattr(end_report, "training_plot", lambda *_: Undrawn())
