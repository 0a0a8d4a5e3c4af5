"""Where metrics and samples are sent besides the files: TensorBoard and Weights & Biases."""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker

from fastpg.report.run import sample_of
from fastpg.trainer.settings.parsing import InputError, did_you_mean

TRACKERS = ("tensorboard", "wandb")
"""What `report_to` may name."""

PROJECT = "fastpg"
"""The project in Weights & Biases, unless the variable WANDB_PROJECT names another."""

COLUMNS = ("prompt", "completion", "score", "length", "finished")


def checked_trackers(names: Sequence[str]) -> list[str]:
    """Check the setting `report_to`.

    Args:
        names: Names of `TRACKERS`, or "none" alone.

    Returns:
        The names of the trackers, of "none" nothing.

    Raises:
        InputError: A name is unknown, "none" is one of several, or wandb is not installed.
    """
    if list(names) == ["none"]:
        return []
    for name in names:
        if name == "none":
            raise InputError(f"report_to is none or names trackers, not both: {', '.join(names)}.")
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            nearest = did_you_mean(name, TRACKERS)
            raise InputError(f"report_to must be of {known} or none, not {name!r}{nearest}")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise InputError("report_to=wandb needs the package wandb: pip install wandb.")
    return list(dict.fromkeys(names))


def start_trackers(
    accelerator: Accelerator,
    names: Sequence[str],
    directory: Path,
    settings: dict[str, Any],
    begun: str,
    resumed_at: int | None,
) -> None:
    """Let the accelerator send what it is told to log.

    Args:
        accelerator: The accelerator of the run.
        names: What `checked_trackers` returned.
        directory: The directory of the run.
        settings: The settings of the run.
        begun: When the run was started first: a run that is taken up has the same.
        resumed_at: The step after which it is taken up, if it is.

    Raises:
        InputError: Weights & Biases refuses the run; nobody has logged in, say.
    """
    trackers: list[Any] = []
    if "tensorboard" in names:
        # What TensorBoard has of later steps would be shown beside what comes now.
        purge = {} if resumed_at is None else {"purge_step": resumed_at + 1}
        trackers.append(TensorBoardTracker("tensorboard", directory, **purge))
    if "wandb" in names:
        # By this name Weights & Biases knows a run again.
        name = hashlib.sha1(f"{directory.resolve()} {begun}".encode()).hexdigest()[:12]
        trackers.append(
            WandBTracker(
                os.environ.get("WANDB_PROJECT", PROJECT),
                id=name,
                name=directory.name or PROJECT,
                dir=str(directory),
                config=settings,
                resume="allow",
            )
        )
    accelerator.log_with = trackers
    try:
        accelerator.init_trackers(PROJECT)
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"The run cannot be tracked (report_to={', '.join(names)}): {reason}"
        ) from error


def track_samples(
    accelerator: Accelerator, title: str, step: int, records: Iterable[dict[str, Any]]
) -> None:
    """Send samples: as a text to TensorBoard, as a table to Weights & Biases.

    Args:
        accelerator: The accelerator of the run.
        title: What they are samples of.
        step: The step.
        records: What `Episodes.records` yields.
    """
    lines = [_cells(record) for record in records]
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_table(f"samples/{title}", list(COLUMNS), lines, step=step)
        else:
            tracker.log({f"samples/{title}": _markdown(lines)}, step=step)


def _cells(record: dict[str, Any]) -> list[Any]:
    sample = sample_of(record)
    prompt = "\n".join(f"{role}: {text}" if role else text for role, text in sample.prompt)
    return [prompt, sample.completion, record["score"], record["length"], record["finished"]]


def _markdown(lines: Sequence[Sequence[Any]]) -> str:
    """Return a table as TensorBoard's texts show it."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *lines]
    # A bar would begin another cell, and a line break another row.
    cells = [[str(x).replace("|", r"\|").replace("\n", "<br>") for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
