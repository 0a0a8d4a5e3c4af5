"""The files of checkpoints: each is on the disk whole, or not at all.

A checkpoint is a directory `checkpoint-<step>` in the output directory of a run:

    model/                the policy and its tokenizer, for `from_pretrained`; the value head or
                          value model
    tensors.safetensors   the state of the optimiser, and weights that model/ does not hold
    state.json            the rest: random numbers, schedule, settings, first evaluation
    manifest.json         size and sha256 of each file above

It is written under another name, flushed to the disk and renamed; only then does the file `LATEST`
name it. Nothing in it is a pickle, so reading it runs no code.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpg.trainer.models.policy import VALUE_MODEL
from fastpg.trainer.run.files import (
    files_in,
    flush,
    flush_all,
    reason_of,
    temporary_beside,
    write_text,
)
from fastpg.trainer.settings.parsing import InputError

logger = logging.getLogger(__name__)

LATEST = "LATEST"
FOLDERS = {"weights.policy.": "", f"weights.{VALUE_MODEL}.": f"{VALUE_MODEL}/"}
"""The folder in model/ whose files hold the weights with names that begin so, without that."""


class DamagedError(InputError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Args:
        step: The step; 0 before training.
        tensors: Weights and the state of the optimiser, on the CPU, by name.
        state: Everything else, as JSON.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run: Path, checkpoint: Checkpoint, save_model: Callable[[Path], None], keep: int | None
) -> Path:
    """Write a checkpoint, and remove those that are too many.

    Args:
        run: The output directory of the run.
        checkpoint: The checkpoint.
        save_model: Writes the model into a directory.
        keep: How many checkpoints are left, the newest. None: all.

    Returns:
        The directory of the checkpoint.

    Raises:
        StorageError: A file cannot be written. The checkpoints before are as they were.
    """
    directory = run / f"checkpoint-{checkpoint.step}"
    with temporary_beside(directory) as temporary:
        save_model(temporary / "model")
        tensors, in_model = _without_copies(checkpoint.tensors, temporary / "model")
        save_file(tensors, temporary / "tensors.safetensors")
        state = {"step": checkpoint.step, "in_model": in_model, **checkpoint.state}
        # The prompts in it may hold what JSON has no form for, such as a date or an image.
        text = json.dumps(state, default=str)
        (temporary / "state.json").write_text(text, encoding="utf-8")
        manifest = {name: _described(temporary / name) for name in files_in(temporary)}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush_all(temporary)
        # One of the same step was left by a run that has since been taken up before it.
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        flush(run)
        write_text(run / LATEST, directory.name)
    # The same holds for those of later steps.
    steps = [step for step in _steps(run) if step <= checkpoint.step]
    kept = set(steps if keep is None else steps[:keep])
    for step in set(_steps(run)) - kept:
        shutil.rmtree(run / f"checkpoint-{step}", ignore_errors=True)
    return directory


def _without_copies(
    tensors: dict[str, Tensor], model: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Leave out the weights that the files in `model` hold bit for bit; say which file does."""
    left, in_model = dict(tensors), {}
    for prefix, folder in FOLDERS.items():
        for file in sorted(model.glob(f"{folder}*.safetensors")):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no dict)
                    ours = left.get(prefix + name)
                    if ours is not None and _same_bits(ours, stored.get_tensor(name)):
                        in_model[prefix + name] = folder + file.name
                        del left[prefix + name]
    return {name: tensor.contiguous() for name, tensor in left.items()}, in_model


def _name_in_model(name: str) -> str:
    """Return the name of a weight in the files of the model."""
    prefix = next(prefix for prefix in FOLDERS if name.startswith(prefix))
    return name.removeprefix(prefix)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(first, second)


def _described(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints in a directory, the newest first."""
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run.glob("checkpoint-*"))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def load_checkpoint(place: Path) -> Checkpoint:
    """Read the newest checkpoint that is whole; a warning names each one that is not.

    Args:
        place: The output directory of a run, or the checkpoint to begin the search at.

    Returns:
        The checkpoint.

    Raises:
        InputError: There is no whole checkpoint.
    """
    run, steps = _candidates(place)
    for step in steps:
        directory = run / f"checkpoint-{step}"
        try:
            return _read(directory)
        except DamagedError as damage:
            logger.warning("%s is damaged (%s); the one before it is used.", directory, damage)
    raise InputError(f"There is no {'whole ' if steps else ''}checkpoint in {place}.")


def run_of(place: Path) -> Path:
    """Return the directory of a run.

    Args:
        place: That directory, which may have any name, or a checkpoint in it.
    """
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", place.name) and not (place / LATEST).exists()
    return place.parent if is_checkpoint else place


def _candidates(place: Path) -> tuple[Path, list[int]]:
    """Return the directory of a run, and the steps of its checkpoints in the order of trial."""
    run = run_of(place)
    if run != place:
        first = place.name
        if not place.is_dir():
            raise InputError(f"There is no checkpoint {place}.")
    else:
        try:
            first = (place / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            first = ""
    match = re.fullmatch(r"checkpoint-(\d+)", first)
    steps = _steps(run)
    # Without a readable LATEST, the newest is as good.
    return run, [step for step in steps if match is None or step <= int(match[1])]


def _read(directory: Path) -> Checkpoint:
    """Read a checkpoint whose files are those of its manifest."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        for name in sorted({*manifest, "state.json", "tensors.safetensors"}):
            if _described(directory / name) != manifest.get(name):
                raise DamagedError(f"{name} is not as it was written")
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "tensors.safetensors")
        for file in sorted(set(state["in_model"].values())):
            with safe_open(directory / "model" / file, "pt") as stored:
                names = [name for name, holder in state["in_model"].items() if holder == file]
                for name in names:
                    tensors[name] = stored.get_tensor(_name_in_model(name))
    except OSError as error:
        name = Path(error.filename or directory).name
        raise DamagedError(f"{name}: {reason_of(error)}") from None
    except (ValueError, TypeError, AttributeError, KeyError, SafetensorError):
        # The manifest itself is damaged, or what it vouches for was written by something else.
        raise DamagedError("manifest.json or state.json cannot be read") from None
    return Checkpoint(state["step"], tensors, state)
