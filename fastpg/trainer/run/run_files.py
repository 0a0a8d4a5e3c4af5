"""The files of a run: each is complete up to the last step, whatever stops the run."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from fastpg.trainer.run.checkpoint import LATEST
from fastpg.trainer.run.files import only_writer, write_text
from fastpg.trainer.run.start import Start
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError

FILES = {
    "model": "the policy and its tokenizer, for `from_pretrained`; the value head or model",
    "best_model": "likewise, as it was at its best evaluation",
    "checkpoint-*": "what `fastpg train --resume` goes on from",
    "metrics.jsonl": "the metrics, one line a step; step 0 is the evaluation before training",
    "completions": "samples of every step",
    "evaluations": "samples of every evaluation, of the same prompts",
    "tensorboard": "metrics and samples, for TensorBoard",
    "config.yaml": "the settings as given, for `fastpg train --config`",
    "run.json": "command, versions, machine and kernels of every start",
    "summary.md": "this report",
    "reward.png": "reward, evaluations and, where there is one, KL over the steps",
    "reward_model.png": "margins and calibration of a reward model",
    "report.html": "what `fastpg report` makes of these files",
}
"""What a run leaves in its output directory. `*` stands for any number."""


REPLACED = ("metrics.jsonl", "model", "best_model", "checkpoint-*")
"""The files that tell that another run has used a directory: a new one would overwrite them."""


def make_directory(directory: Path) -> None:
    """Make an output directory.

    Args:
        directory: Its path.

    Raises:
        InputError: It cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write to {error.filename}: {error.strerror}.") from error


class RunFiles:
    """Metrics, samples, settings and provenance of a run, in its output directory.

    Args:
        args: The settings of the run.
        directory: The output directory, absolute.
        resumed_at: The step after which an earlier run in the same directory is taken up. None:
            this is a new run.
    """

    def __init__(self, args: PPOConfig, directory: Path, resumed_at: int | None) -> None:
        self.args = args
        self.directory = directory
        self.resumed_at = resumed_at
        self.steps: list[dict[str, Any]] = []
        """The metrics of each step, and its number as "step"."""
        self.begun = ""
        """When the run was started first."""
        self.set_aside: Path | None = None
        """Where the files of a run are that used the directory before, if one did."""
        self._opened = ExitStack()
        # Whether metrics.jsonl lacks some of the steps, for want of room.
        self._is_behind = False

    def open(self, start: Start) -> None:
        """Make the output directory and begin or continue its files.

        Args:
            start: What the run was started with.

        Raises:
            InputError: The directory cannot be written to, or another run is writing to it.
        """
        make_directory(self.directory)
        try:
            self._opened.enter_context(only_writer(self.directory))
            if self.resumed_at is None:
                self.set_aside = set_earlier_run_aside(self.directory)
            for name in ("completions", "evaluations"):
                (self.directory / name).mkdir(exist_ok=True)
            # The settings are written first: they say what a run was that failed in its first step.
            save_config(self.args, self.directory / "config.yaml")
            self._write_start(start)
            self._keep_until(self.resumed_at or 0)
            self._open_metrics()
        except OSError as error:
            raise InputError(f"Cannot write to {error.filename}: {error.strerror}.") from error

    def close(self) -> None:
        """Close the files, and leave the directory to other runs."""
        self._opened.close()

    def _write_start(self, start: Start) -> None:
        """Add what the run was started with to `run.json`."""
        path = self.directory / "run.json"
        starts: list[dict[str, Any]] = []
        # A run of an older version has no such file.
        if self.resumed_at is not None and path.exists():
            try:
                starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged; without it the run can go on.") from error
        starts.append(asdict(start))
        self.begun = starts[0]["date"]
        run = {
            "algorithm": self.args.resolved().algorithm.title,
            "num_steps": self.args.num_steps,
            "starts": starts,
        }
        write_text(path, json.dumps(run, indent=2) + "\n")

    def _keep_until(self, step: int) -> None:
        """Forget what was written of later steps."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A run that was killed may have left half a line.
        self.steps = [row for row in map(_parsed, lines) if row is not None and row["step"] <= step]
        for folder in ("completions", "evaluations"):
            for samples in (self.directory / folder).glob("step_*.jsonl"):
                if samples.stem > f"step_{step:06d}":
                    samples.unlink()

    def _open_metrics(self) -> None:
        """Write all metrics so far to their file, and open it for those to come."""
        path = self.directory / "metrics.jsonl"
        write_text(path, "".join(f"{_as_json(row)}\n" for row in self.steps))
        self._metrics = self._opened.enter_context(path.open("a", encoding="utf-8"))
        self._is_behind = False

    def flush(self) -> None:
        """Wait until the metrics are on the disk."""
        os.fsync(self._metrics.fileno())

    def begin(self, metrics: dict[str, float]) -> None:
        """Write step 0, which comes before the others.

        Args:
            metrics: Those of the evaluation before training.
        """
        self.steps.insert(0, {"step": 0, **metrics})
        self._rewrite()

    def end(self, step: int, metrics: dict[str, float]) -> None:
        """Add metrics to the last step.

        Args:
            step: Its number.
            metrics: Those of the evaluation after training.
        """
        # Someone may have removed the metrics of a run that is taken up at its end.
        if not self.steps:
            self.steps.append({"step": step})
        self.steps[-1] |= metrics
        self._rewrite()

    def _rewrite(self) -> None:
        # What cannot be written now, the next step writes.
        self._is_behind = True
        self._open_metrics()

    def step(self, step: int, samples: Sequence[dict[str, Any]], metrics: dict[str, float]) -> None:
        """Write a step, and first those that could not be written before.

        Args:
            step: Its number, from 1.
            samples: Records of some of its episodes.
            metrics: Its metrics.
        """
        self.steps.append({"step": step, **metrics})
        if self._is_behind:
            self._open_metrics()
        else:
            # Should this fail, the next step writes both.
            self._is_behind = True
            print(_as_json(self.steps[-1]), file=self._metrics, flush=True)
            self._is_behind = False
        self.samples("completions", step, samples)

    def samples(self, folder: str, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Write samples.

        Args:
            folder: "completions" or "evaluations".
            step: The step that they are of.
            samples: What `Episodes.records` yields.
        """
        # Each step has a file of its own: a run that is killed leaves no half of an older one.
        # A prompt may hold what JSON has no form for, such as a date or an image.
        lines = [f"{json.dumps(sample, default=str)}\n" for sample in samples]
        path = self.directory / folder / f"step_{step:06d}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")


def set_earlier_run_aside(directory: Path) -> Path | None:
    """Move what another run has left in a directory into `earlier-N` inside it.

    Args:
        directory: The output directory of a new run, of a policy or a reward model.

    Returns:
        Where the files are now. None: there was no run.
    """
    # Other trainers leave models and checkpoints by the same names, which this run would replace
    # and remove.
    if not any(path for name in REPLACED for path in directory.glob(name)):
        return None
    numbers = count(1)
    aside = directory / f"earlier-{next(numbers)}"
    while aside.exists():
        aside = directory / f"earlier-{next(numbers)}"
    aside.mkdir()
    # Only the files of a run are moved: the directory may hold others.
    for name in (*FILES, LATEST):
        for path in directory.glob(name):
            shutil.move(path, aside / path.name)
    return aside


def word_of_moved(name: str, aside: Path) -> str:
    """Say where the files of an earlier run are.

    Args:
        name: How the settings name the directory of the run.
        aside: What `set_earlier_run_aside` returned.
    """
    return f"The files of an earlier run in {name} are now in {Path(name, aside.name)}."


def check_taken_up(run: Path, directory: Path) -> None:
    """Refuse to take up a run in a directory that holds another one, whose files would be lost.

    Args:
        run: The directory of the run that is taken up.
        directory: Where it goes on.

    Raises:
        InputError: It does.
    """
    if (directory / "metrics.jsonl").exists() and run.resolve() != directory.resolve():
        raise InputError(
            f"The run of {run} cannot go on in {directory}, which holds the files of another run."
        )


def check_apart(model: str | None, directory: Path) -> None:
    """Refuse a model that is among the files of a run, which moves or overwrites those.

    Args:
        model: The directory or name that the run starts from. Empty or None: it was built in code.
        directory: The output directory of the run.

    Raises:
        InputError: It is.
    """
    if not model or not Path(model).is_dir():
        return
    # `Path.resolve` raises where links lead in a circle.
    place, own = (Path(os.path.realpath(path)) for path in (model, directory))
    if own not in place.parents:
        return
    first = place.relative_to(own).parts[0]
    if any(fnmatch(first, name) for name in FILES):
        raise InputError(
            f"The model {model} is where the run in {directory} writes its own files; give the run "
            "another output_dir."
        )


def _as_json(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity.
    return json.dumps({name: x if math.isfinite(x) else None for name, x in row.items()})


def _parsed(line: str) -> dict[str, Any] | None:
    """Return a line of metrics; None if it is not whole."""
    try:
        row = json.loads(line)
        return {name: math.nan if x is None else x for name, x in row.items()}
    except (ValueError, AttributeError):
        return None


def save_config(config: Any, path: Path) -> None:
    """Write settings as they were given, as YAML, in the order of their declaration.

    Args:
        config: The dataclass of the settings.
        path: The file to write.
    """
    write_text(path, yaml.safe_dump(asdict(config), sort_keys=False))
