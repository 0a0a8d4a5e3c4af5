"""The files of a run, read: metrics, samples, settings and what it was started with."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class ReportError(ValueError):
    """There is no page to be made. The message is one plain sentence."""


class Point(NamedTuple):
    """A metric at a step; a value that is missing or not finite is NaN."""

    step: int
    value: float


class Sample(NamedTuple):
    """A prompt and its completion.

    Args:
        prompt: The messages of the prompt, each as its role and its text. A text has no role.
        completion: The completion.
        score: Its score, if it is a number.
        length: Its tokens, if they were counted.
        finished: Whether it has an EOS.
    """

    prompt: tuple[tuple[str, str], ...]
    completion: str
    score: float | None
    length: int | None
    finished: bool


@dataclass(frozen=True)
class Run:
    """A run as its files tell it.

    Args:
        directory: The directory of the run.
        rows: The metrics of the steps by name, in the order of the steps, each with "step".
        settings: The settings by name; empty if they cannot be read.
        algorithm: The name of the algorithm; empty if it is not known.
        num_steps: The steps that it was to make, if that is known.
        starts: What it was started with, the first time and each time it was taken up.
        evaluations: Samples of each evaluation by the step before it.
        completions: Samples of the last step, and its number; for runs without evaluations.
        notes: What could not be read, in sentences.
    """

    directory: Path
    rows: list[dict[str, float]]
    settings: dict[str, Any]
    algorithm: str
    num_steps: int | None
    starts: list[dict[str, Any]]
    evaluations: dict[int, list[Sample]]
    completions: tuple[int, list[Sample]]
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def read(directory: Path) -> "Run":
        """Read a run.

        Args:
            directory: The `output_dir` of the run.

        Returns:
            The run. What is missing or damaged is left out, and named in `notes`.

        Raises:
            ReportError: The directory is not there, or holds no metrics of a run.
        """
        notes: list[str] = []
        rows = _read_metrics(directory, notes)
        settings = _read_mapping(directory / "config.yaml", notes)
        written = _read_mapping(directory / "run.json", notes)
        starts = written.get("starts")
        samples = {
            folder: {
                int(path.stem.removeprefix("step_")): path
                for path in (directory / folder).glob("step_*.jsonl")
                if path.stem.removeprefix("step_").isdecimal()
            }
            for folder in ("evaluations", "completions")
        }
        last = max(samples["completions"], default=0)
        last_samples = [samples["completions"][last]] if samples["completions"] else []
        return Run(
            directory=directory,
            rows=rows,
            settings=settings,
            algorithm=str(written.get("algorithm") or settings.get("algorithm") or ""),
            num_steps=_whole(written.get("num_steps", settings.get("num_steps"))),
            starts=[x for x in starts if isinstance(x, dict)] if isinstance(starts, list) else [],
            evaluations={
                step: _read_samples([path], notes)
                for step, path in sorted(samples["evaluations"].items())
            },
            completions=(last, _read_samples(last_samples, notes)),
            notes=notes,
        )

    @property
    def last_step(self) -> int:
        """The last step that was recorded."""
        return int(self.rows[-1]["step"])

    def metrics(self) -> list[str]:
        """Return the names of all metrics, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))

    def points(self, metric: str) -> list[Point]:
        """Return a metric of each step from the first to the last one that has it."""
        points = [Point(int(row["step"]), row.get(metric, math.nan)) for row in self.rows]
        known = [i for i, row in enumerate(self.rows) if metric in row]
        return points[known[0] : known[-1] + 1] if known else []

    def known(self, metric: str) -> list[Point]:
        """Return the finite values of a metric."""
        return [point for point in self.points(metric) if math.isfinite(point.value)]


def _read_metrics(directory: Path, notes: list[str]) -> list[dict[str, float]]:
    """Return the rows of `metrics.jsonl`, of which the last of a step counts."""
    if not directory.is_dir():
        raise ReportError(f"There is no directory {directory}.")
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise ReportError(f"{directory} is not the directory of a run: it has no metrics.jsonl.")
    lines = [line for line in _text_of(path).splitlines() if line.strip()]
    rows = {}
    damaged = 0
    for line in lines:
        row = _row(line)
        if row is None:
            damaged += 1
        else:
            rows[row["step"]] = row
    if not rows:
        has = "no whole line" if lines else "nothing in it yet"
        raise ReportError(f"{path} has {has}, so there is nothing to report.")
    if damaged:
        # A run that was killed leaves half a line.
        notes.append(f"Lines of metrics.jsonl that cannot be read and are left out: {damaged}.")
    # The loss of a reward model over its steps is another thing than the reward of a policy.
    if not any(name.endswith("reward/mean") for row in rows.values() for name in row):
        raise ReportError(f"{directory} is not the directory of a policy's run: it has no rewards.")
    return [rows[step] for step in sorted(rows)]


def _row(line: str) -> dict[str, float] | None:
    """Return a line of metrics with NaN for what is no finite number; None if it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or _whole(values.get("step")) is None:
        return None
    row = {}
    for name, value in values.items():
        if isinstance(value, int | float) and math.isfinite(value):
            row[name] = float(value)
        else:
            row[name] = math.nan
    return row


def _read_samples(paths: Sequence[Path], notes: list[str]) -> list[Sample]:
    """Return the samples of files, without those that cannot be read."""
    samples = []
    for path in paths:
        for line in _text_of(path).splitlines():
            try:
                samples.append(sample_of(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError):
                notes.append(f"A sample of {path.parent.name}/{path.name} cannot be read.")
    return samples


def sample_of(record: dict[str, Any]) -> Sample:
    """Return a sample from the record that a run writes of it."""
    prompt = record["prompt"]
    messages = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    score = record.get("score")
    if not isinstance(score, int | float) or not math.isfinite(score):
        score = None
    return Sample(
        prompt=tuple((str(m.get("role", "")), _content(m.get("content"))) for m in messages),
        completion=_content(record["completion"]),
        score=score,
        length=_whole(record.get("length")),
        finished=bool(record.get("finished", True)),
    )


def _content(content: Any) -> str:
    """Return the text of a message: of a string, a list of parts, or nothing."""
    if isinstance(content, list):
        return " ".join(_content(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; nothing if it is not there or damaged."""
    if not path.exists():
        return {}
    try:
        # JSON is YAML, but its own parser is a hundred times as fast.
        text = _text_of(path)
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        notes.append(f"{path.name} cannot be read.")
        return {}
    return {str(name): value for name, value in values.items()}


def _text_of(path: Path) -> str:
    try:
        # A killed run may leave half a character.
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"Cannot read {path}: {error.strerror}.") from error


def _whole(value: Any) -> int | None:
    """Return a value if it is a whole number and no truth value."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
