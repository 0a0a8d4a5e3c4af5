"""The report at the end of a run: it says what it is given, and it cannot fail a run."""

from pathlib import Path

import pytest
from tiny_trainer import make_trainer

from fastpg.trainer.report import Report, _shortened


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "the sea"}, "the sea"),
        (
            {"content": [{"type": "text", "text": "the"}, {"type": "text", "text": "sea"}]},
            "the sea",
        ),
        ({"content": [{"type": "image", "image": 3}, "what"]}, ""),
        ({"content": None, "tool_calls": []}, ""),
        ({}, ""),
    ],
)
def test_any_message_has_a_text(message, text):
    assert (
        _shortened([{"role": "system", "content": "be kind"}, {"role": "user", **message}]) == text
    )


@pytest.mark.parametrize("name", ["out[/b]", "out[bold]"])
def test_a_directory_is_no_markup(tmp_path, capsys, name):
    make_trainer(tmp_path / name, num_steps=1).train()
    printed = capsys.readouterr().out
    assert "The report is not complete" not in printed
    assert name in printed.replace("\n", "")
    assert Path(tmp_path, name, "summary.md").exists()


def test_a_report_that_fails_costs_nothing_else(tmp_path, monkeypatch, capsys):
    def broken(report):
        raise KeyError("content")

    monkeypatch.setattr(Report, "_sections", broken)
    metrics = make_trainer(tmp_path, num_steps=1).train()
    assert "eval/reward/mean" in metrics
    assert "The report is not complete (KeyError: 'content')." in capsys.readouterr().out
