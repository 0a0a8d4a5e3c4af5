"""Files of a run: written whole or not at all, by one run at a time, where there is room."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fastpg.trainer.settings.parsing import InputError


class StorageError(InputError):
    """The files of a run cannot be written: the disk is full, say."""


@contextmanager
def temporary_beside(directory: Path) -> Iterator[Path]:
    """Yield an empty directory beside `directory`; what is left there at the end is removed."""
    # "." has no name of its own, and what a link leads to may be on another disk.
    whole = directory.resolve()
    temporary = whole.with_name(f".{whole.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except (OSError, SafetensorError) as error:
        raise StorageError(f"Cannot write {directory}: {reason_of(error)}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(directory: Path, save_model: Callable[[Path], None]) -> None:
    """Write a model into a directory, where other files may be, once all of it is on the disk.

    Args:
        directory: The directory.
        save_model: Writes the model into a directory.

    Raises:
        StorageError: A file cannot be written. An earlier model in the directory is as it was.
    """
    with temporary_beside(directory) as temporary:
        save_model(temporary)
        flush_all(temporary)
        directory.mkdir(exist_ok=True)
        # Loading would find the weights of an earlier model in files of other names, or take the
        # new model for an earlier adapter.
        for pattern in ("*.safetensors*", "adapter_config.json"):
            for stale in list(directory.glob(pattern)):
                if not (temporary / stale.name).exists():
                    stale.unlink()
        for name in files_in(temporary):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).replace(directory / name)
        flush(directory)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8.

    Args:
        path: The file. One that exists is replaced.
        text: What it shall hold.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_all(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    # Windows has no such call for directories.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: Exception) -> str:
    # The message of an OSError names the temporary file too, and safetensors has no strerror.
    strerror = getattr(error, "strerror", None)
    return strerror or " ".join(str(error).split())


def files_in(directory: Path) -> list[str]:
    """Return the names of all files below a directory, the same on every system."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def size_of(directory: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum((directory / name).stat().st_size for name in files_in(directory))


def require_space(directory: Path, size: int, what: str) -> None:
    """Refuse to write more than there is room for.

    Args:
        directory: Where it would be written.
        size: The bytes.
        what: What they are, for the error.

    Raises:
        StorageError: The disk has less room, or the directory is gone.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise StorageError(f"Cannot write to {directory}: {reason_of(error)}.") from error
    if free < size:
        raise StorageError(
            f"{directory} has {free / 1e6:,.2f} MB free, but {what} takes {size / 1e6:,.2f} MB."
        )


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory inside the `with` block.

    Args:
        directory: The output directory of a run.

    Raises:
        InputError: Another process is writing to it.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks.
        yield
        return
    with (directory / ".lock").open("a") as file:
        # The system takes the lock away from a process that dies, whatever killed it.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another run is writing to {directory}.") from None
        _clear_up(directory)
        yield


def _clear_up(directory: Path) -> None:
    """Remove what a killed run had not written to the end."""
    # Users may have temporary files of their own there; these names end with a uuid.
    for leftover in directory.glob(f".*.{'[0-9a-f]' * 32}.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
