"""What the page has besides curves: summaries, samples, times, settings, and what ran where."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastpg.report.numbers import MISSING, change, duration, number, percent
from fastpg.report.run import Run, Sample

NUM_SAMPLES = 12
"""So many prompts are shown at most."""


class Comparison(NamedTuple):
    """A metric before and after training, written out."""

    metric: str
    before: str
    after: str
    change: str


class Answer(NamedTuple):
    """What a run wrote for a prompt, before and after training."""

    run: int
    before: Sample | None
    after: Sample | None


class Asked(NamedTuple):
    """A prompt, as the role and the text of each message, and the answers of the runs to it."""

    prompt: tuple[tuple[str, str], ...]
    answers: list[Answer]


class Phase(NamedTuple):
    """A phase of the steps: its seconds, and its share of the time of the longest run."""

    name: str
    time: str
    share: str
    width: float


class Row(NamedTuple):
    """A setting, and its value in each run."""

    name: str
    values: list[str]
    differs: bool


def evaluations(run: Run) -> list[Comparison]:
    """Compare the first evaluation of a run with its last; nothing if there are not two."""
    rows = [row for row in run.rows if any(name.startswith("eval/") for name in row)]
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    lines = []
    for name in first:
        if name.startswith("eval/") and name in last:
            before, after = first[name], last[name]
            lines.append(
                Comparison(
                    metric=name.removeprefix("eval/"),
                    before=_finite(before, number),
                    after=_finite(after, number),
                    change=_finite(after - before, change),
                )
            )
    return lines


def _finite(value: float, write: Callable[[float], str]) -> str:
    return write(value) if math.isfinite(value) else MISSING


def summary(run: Run) -> list[tuple[str, str]]:
    """Return the key figures of a run: a name and a value each."""
    figures = []
    compared = {line.metric: line for line in evaluations(run)}
    if "reward/mean" in compared:
        reward = compared["reward/mean"]
        figures.append(("Reward in evaluation", f"{reward.before} → {reward.after}"))
    for title, metric, write in (
        ("KL, nats per completion", "objective/kl", number),
        ("Clipped tokens", "policy/clip_frac", percent),
        ("Explained variance", "value/explained_variance", number),
    ):
        known = run.known(metric)
        if known:
            figures.append((title, write(known[-1].value)))
    total = sum(point.value for point in run.known("time/step"))
    if total:
        figures.append(("Time of the steps", duration(total)))
    return figures


class Summaries(NamedTuple):
    """The key figures of several runs: their names, and for each run the values."""

    names: list[str]
    lines: list[list[str]]


def summary_table(runs: Sequence[Run]) -> Summaries:
    """Return the key figures of runs as a table, with a dash for what a run has not."""
    figures = [dict(summary(run)) for run in runs]
    names = list(dict.fromkeys(name for run in figures for name in run))
    return Summaries(names, [[run.get(name, MISSING) for name in names] for run in figures])


def evaluation_table(runs: Sequence[Run]) -> list[tuple[str, list[Comparison]]]:
    """Return the evaluations of runs, metric by metric, with dashes for what a run has not."""
    compared = [{line.metric: line for line in evaluations(run)} for run in runs]
    names = dict.fromkeys(name for lines in compared for name in lines)
    return [
        (name, [lines.get(name, Comparison(name, MISSING, MISSING, MISSING)) for lines in compared])
        for name in names
    ]


def begun(run: Run) -> str:
    """Say when a run was started first, if that is known."""
    return str(run.starts[0].get("date") or "")[:16] if run.starts else ""


def versions(run: Run) -> list[tuple[str, str]]:
    """Return the versions of packages when a run was last started."""
    given = run.starts[-1].get("versions")
    return [(str(name), str(x)) for name, x in given.items()] if isinstance(given, dict) else []


def progress(run: Run) -> str:
    """Say how far a run has come."""
    if run.num_steps is None:
        return f"{run.last_step} steps"
    words = f"{run.last_step} of {run.num_steps} steps"
    return words if run.last_step >= run.num_steps else f"{words}, not finished"


def phases(runs: Sequence[Run]) -> list[list[Phase]]:
    """Return the phases of each run's steps, in their order."""
    seconds = [
        {
            name.removeprefix("time/"): sum(point.value for point in run.known(name))
            for name in run.metrics()
            if name.startswith("time/") and name != "time/step"
        }
        for run in runs
    ]
    longest = max((sum(times.values()) for times in seconds), default=0.0)
    return [
        [
            Phase(name, duration(s), percent(s / sum(times.values())), 100 * s / longest)
            for name, s in times.items()
            if s > 0
        ]
        for times in seconds
    ]


def samples(runs: Sequence[Run]) -> list[Asked]:
    """Return prompts with the answers to them, those that several runs share once."""
    asked: dict[tuple[tuple[str, str], ...], dict[int, Answer]] = {}
    for i, run in enumerate(runs):
        for answer, prompt in _answers(i, run):
            # Of several completions of a prompt, the first is shown.
            asked.setdefault(prompt, {}).setdefault(i, answer)
    shown = list(asked.items())[:NUM_SAMPLES]
    return [Asked(prompt, list(answers.values())) for prompt, answers in shown]


def _answers(index: int, run: Run) -> list[tuple[Answer, tuple[tuple[str, str], ...]]]:
    found = [samples for samples in run.evaluations.values() if samples]
    if len(found) > 1:
        # Evaluations have the same prompts in the same order.
        return [
            (Answer(index, before, after), after.prompt)
            for before, after in zip(found[0], found[-1], strict=False)
        ]
    # A run that was stopped before its second evaluation has samples of its last step.
    last = run.completions[1] or (found[0] if found else [])
    return [(Answer(index, None, sample), sample.prompt) for sample in last]


def last_samples(run: Run) -> str:
    """Say which step the samples of a run are of."""
    found = [step for step, samples in run.evaluations.items() if samples]
    step = found[-1] if len(found) > 1 else run.completions[0]
    return f"after step {step}" if step else "before training"


def settings(runs: Sequence[Run]) -> list[Row]:
    """Return the settings of all runs, but for what no run was given."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name) for run in runs]
        if any(value is not None for value in values):
            texts = [_setting(value) for value in values]
            rows.append(Row(name, texts, differs=len(set(texts)) > 1))
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def kernels(run: Run) -> list[tuple[str, list[str]]]:
    """Return the ops that each kind of kernel served when the run was last started."""
    served: dict[str, list[str]] = {}
    of_ops = run.starts[-1].get("kernels") if run.starts else None
    for op, kernel in (of_ops if isinstance(of_ops, dict) else {}).items():
        served.setdefault(str(kernel), []).append(str(op))
    return sorted(served.items(), key=lambda item: -len(item[1]))
