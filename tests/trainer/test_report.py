"""What a run shows and plots, and its report, which cannot fail it."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.live import Live
from tiny_trainer import make_trainer

from fastpg.tasks import reviews
from fastpg.trainer.report.display import Display, sparkline
from fastpg.trainer.report.end_report import Report, _shortened
from fastpg.trainer.report.plot import training_plot
from fastpg.trainer.rewards.episodes import Episodes
from fastpg.trainer.run.start import Start


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


@pytest.mark.parametrize("name", ["out[/b]", "out[bold]", "a$^$b"])
def test_a_directory_is_no_markup(tmp_path, capsys, name):
    make_trainer(tmp_path / name, num_steps=1).train()
    printed = capsys.readouterr().out
    assert "The report is not complete" not in printed
    assert name in printed.replace("\n", "")
    assert Path(tmp_path, name, "summary.md").exists()


def test_a_report_that_fails_costs_nothing_else(tmp_path, monkeypatch, capsys):
    def broken(report):
        raise KeyError("content")

    monkeypatch.setattr(Report, "_evaluation", broken)
    metrics = make_trainer(tmp_path, num_steps=1).train()
    assert "eval/reward/mean" in metrics
    assert "The report is not complete (KeyError: 'content')." in capsys.readouterr().out


# On a terminal of 24 lines.


def terminal():
    return Console(
        file=io.StringIO(), force_terminal=True, color_system=None, width=80, height=24,
        highlight=False,
    )  # fmt: skip


STEP = {
    "reward/mean": 0.5, "objective/kl": 0.25, "policy/clip_frac": 0.125,
    "value/explained_variance": -0.5, "tokens_per_second": 1234.0, "time/step": 2.0,
}  # fmt: skip


def test_the_table_and_its_legend_fit_on_the_screen():
    display = Display(1000)
    display.console = terminal()
    display.step(0, {"eval/reward/mean": 0.125})
    for step in range(1, 101):
        display.step(step, STEP | ({"eval/reward/mean": 0.75} if step % 10 == 0 else {}))
    display._next = 101
    display.live = None
    display._doing = "step 101/1000: sampling completions ..."
    with display.console.capture() as capture:
        display.console.print(display._screen())
    lines = capture.get().splitlines()
    assert 20 <= len(lines) < 24
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert f"reward {'▄' * 50} +0.500 to +0.500" in text
    for shown in ("100/1000", "+0.750", "0.250", "12.5%", "-0.50", "1234", "30:00"):
        assert shown in text
    assert "KL: to the starting model, nats per completion; clipped: tokens held at" in text
    assert "exp. var: share of the returns' variance that the critic foresees" in text
    assert "step 101/1000: sampling completions ..." in text


def test_a_sparkline_shows_the_course_of_the_reward():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 60) == "▁▂▃▄▅▆▇█"
    assert sparkline([-1, -1, 1], 60) == "▁▁█"
    # Where there is no room, a block is the mean of neighbors.
    assert sparkline([0, 2, 8, 8, 0, 0], 3) == "▂█▁"
    assert len(sparkline(range(1000), 60)) == 60
    assert sparkline([3.0, 3.0], 60) == "▄▄"


def test_a_terminal_without_blocks_has_no_sparkline():
    display = Display(9)
    display.rewards = [0.0, 1.0]
    display.console = terminal()
    assert "▁█" in display._sparkline()
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    display.console = Console(file=file, force_terminal=True)
    assert display._sparkline() == ""


def test_the_last_evaluation_is_in_the_line_of_the_last_step(capsys):
    display = Display(1)
    display.step(1, STEP)
    display.evaluated(1, {"eval/reward/mean": 0.75})
    assert "step    1/1  eval +0.750" in capsys.readouterr().out
    display.live = Live(console=terminal(), auto_refresh=False)
    display.evaluated(1, {"eval/reward/mean": 0.75})
    (line,) = display._lines
    assert (line["reward"], line["eval"]) == ("+0.500", "+0.750")


def test_a_column_that_an_algorithm_has_not_is_neither_shown_nor_explained(capsys):
    display = Display(2)
    step = {n: x for n, x in STEP.items() if n not in ("objective/kl", "value/explained_variance")}
    display.step(1, step)
    text = capsys.readouterr().out
    assert "clipped: tokens" in text
    assert "KL" not in text and "exp. var" not in text


def episodes(count, completion):
    zeros = torch.zeros(count)
    rewards = {name: zeros for name in ("praise", "grammar", "reward_model")}
    prompts = [f"a question that goes on and on, number {i}" for i in range(count)]
    return Episodes(prompts, [completion] * count, rewards, zeros, zeros, zeros)


def test_the_report_fits_on_the_screen_and_ends_with_evaluation_and_samples(tmp_path):
    report = Report(
        title="PPO",
        before=episodes(64, "an answer of many words " * 9),
        after=episodes(64, "another answer " * 9),
        steps=[{"step": 1, **STEP}],
        seconds={"generate": 1.0, "train": 3.0},
        start=Start.now(torch.device("cpu"), num_processes=1, after_step=0),
        directory=tmp_path,
        name="out",
    )
    console = terminal()
    with console.capture() as capture:
        report.show(console)
    lines = capture.get().splitlines()
    # The last line is for the prompt.
    assert len(lines) < 24
    starts = [
        next(i for i, line in enumerate(lines) if word in line)
        for word in (
            "Written to",
            "Time of the steps: 4 s",
            "Kernels on CPU",
            "Evaluation",
            "Samples",
        )
    ]
    assert starts == sorted(starts)
    assert sum("a question that" in line for line in lines) >= 2


# The plot.


@pytest.mark.parametrize("has_kl", [True, False])
def test_the_plot_has_title_legend_smoothing_and_evaluations(has_kl):
    metrics = {"reward/mean": 0.5} | ({"objective/kl": 0.1} if has_kl else {})
    steps = [{"step": 0, "eval/reward/mean": 0.1}]
    steps += [{"step": step, **metrics} for step in range(1, 41)]
    figure = training_plot("PPO, out", steps, [(0, 0.1), (40, 0.9)])
    reward, *rest = figure.axes
    assert reward.get_title() == "PPO, out"
    labels = [text.get_text() for text in reward.get_legend().get_texts()]
    assert labels == ["each step", "mean of 4 steps", "evaluation"]
    assert reward.lines[2].get_xydata().tolist() == [[0, 0.1], [40, 0.9]]
    assert len(rest) == has_kl
    assert figure.axes[-1].get_xlabel() == "step"


# The embedded task.


def test_the_embedded_task_shows_dapo_without_a_kl_penalty():
    assert reviews.preferred_settings("ppo")["kl_coef"] == 0.1
    assert reviews.preferred_settings("dapo")["kl_coef"] == 0.0
