"""Replaces named globals of another package by fastpg's, and puts them back.

    patches = Patches("trl")
    replacements = [Replacement("trl.trainer.utils.entropy_from_logits", make)]
    report = patches.apply(replacements, strict=False)
    print(report)
    patches.undo()

`from utils import f` gives a module a name of its own for f, which an assignment to `utils.f` does
not reach. So a global is replaced in every module that holds it. Modules that are imported later
take the replacement from where it is defined, and `undo` looks through all modules again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType
from typing import Any, Literal, NamedTuple

logger = logging.getLogger("fastpg")

State = Literal["replaced", "added", "missing", "refused"]


class Refused(Exception):
    """Raised by `Replacement.make` for an original that it cannot stand for; says why."""


class PatchError(RuntimeError):
    """Something was not replaced, and strict=True. Then nothing is."""


class Replacement(NamedTuple):
    """What is to be replaced, and by what.

    target: "package.module.name", "package.module.Class.method" or "package.module.REGISTRY[key]".
    make: Takes the original, returns what replaces it, an object of its own. It may raise
        `Refused`.
    everywhere: Whether a global is replaced in every module that holds it, or where `target` says.
    """

    target: str
    make: Callable[[Any], Any]
    everywhere: bool = True


class Addition(NamedTuple):
    """A new entry of a registry: "package.module.REGISTRY[key]". Nothing else may be there."""

    target: str
    value: Any


class PatchRow(NamedTuple):
    """What became of one target."""

    target: str
    state: State  # missing: there is no such name here
    reason: str  # of "replaced": where it was


Change = Replacement | Addition | PatchRow  # a row stands for what the caller refuses


class PatchReport(NamedTuple):
    """What was replaced, what was not, and why."""

    package: str
    version: str | None  # None: it is not installed
    rows: list[PatchRow]  # a call that is left to the package later adds one

    @property
    def complete(self) -> bool:
        """Whether everything was replaced or added."""
        return all(row.state in ("replaced", "added") for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{self.package} {self.version or 'is not installed'}"]
        width = max((len(row.target) for row in self.rows), default=0)
        for row in self.rows:
            lines.append(f"  {row.state:8}  {row.target:{width}}  {row.reason}")
        return "\n".join(lines)


class Place(NamedTuple):
    """A name in a module or a class, or a key in a dict."""

    owner: Any
    name: str

    def get(self) -> Any:
        """What is there; a method as the class holds it. Raises KeyError where there is nothing."""
        return self._names()[self.name]

    def holds(self) -> bool:
        """Whether anything is there."""
        return self.name in self._names()

    def put(self, value: Any) -> None:
        """Puts something else there."""
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)

    def remove(self) -> None:
        """Takes away what is there."""
        if isinstance(self.owner, dict):
            del self.owner[self.name]
        else:
            delattr(self.owner, self.name)

    def _names(self) -> Any:
        return self.owner if isinstance(self.owner, dict) else vars(self.owner)


class Replaced(NamedTuple):
    """An original and what stands in its place."""

    target: str
    place: Place
    original: Any  # NOTHING: `new` was added
    new: Any
    everywhere: bool


NOTHING = object()


class Patches:
    """The replacements in one package: none, or those of one call of `apply`.

    Args:
        package: The name of the package, of its distribution too.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.replaced: list[Replaced] = []
        self.rows: list[PatchRow] = []
        self.strict = False

    @property
    def applied(self) -> bool:
        """Whether anything is replaced."""
        return bool(self.replaced)

    def apply(self, replacements: Iterable[Change], *, strict: bool) -> PatchReport:
        """Makes the replacements, one after another.

        Args:
            replacements: What to replace or add.
            strict: Whether to raise unless everything was replaced or added.

        Returns:
            A row for each. Where something is replaced already, nothing changes, and each says so.

        Raises:
            PatchError: strict, and a row is not "replaced" or "added". Then nothing is.
        """
        was_applied = self.applied
        if was_applied:
            reason = "already patched: unpatch first"
            replacements = [PatchRow(each.target, "refused", reason) for each in replacements]
        report = self.apply_more(replacements)
        if not was_applied:
            self.rows, self.strict = report.rows, strict
        if strict and not report.complete:
            if not was_applied:
                self.undo()
            raise PatchError(f"fastpg: not all of {report}")
        return report

    def leave(self, target: str, reason: str) -> None:
        """Notes in the report that a call is left to the package.

        Raises:
            PatchError: What is replaced was to be replaced strictly.
        """
        if self.strict:
            raise PatchError(f"fastpg: {target}: {reason}")
        row = PatchRow(target, "refused", reason)
        if row not in self.rows:
            self.rows.append(row)

    def apply_more(self, replacements: Iterable[Change]) -> PatchReport:
        """Makes replacements beside those that are made, as when one module after another comes."""
        installed = self.version()
        if installed is None:
            rows = [PatchRow(self.package, "missing", "the package is not installed")]
        else:
            before = len(self.replaced)
            rows = [self._row(each) for each in replacements]
            made = [each for each in self.replaced[before:] if each.everywhere]
            names = _exchange([(each.original, each.new) for each in made])
            found = {each.target: ", ".join(names[id(each.original)]) for each in made}
            rows = [
                row._replace(reason=f"and in {found[row.target]}") if found.get(row.target) else row
                for row in rows
            ]
        return PatchReport(self.package, installed, rows)

    def apply_and_warn(self, replacements: Iterable[Change]) -> None:
        """The same where nobody looks at a report: what is not made is logged as a warning."""
        report = self.apply_more(replacements)
        if not report.complete:
            logger.warning("fastpg: not all of %s", report)

    def untested(self, tested: str) -> list[Change]:
        """A row, if the installed release is not one of the series that was tested, as "0.9"."""
        installed = self.version()
        if installed is None or f"{installed}.".startswith(f"{tested}."):
            return []
        reason = f"fastpg is tested with {self.package} {tested}"
        return [PatchRow(self.package, "refused", reason)]

    def version(self) -> str | None:
        """The installed version of the package; None if there is none."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def undo(self) -> None:
        """Puts every original back, also in modules that were imported in between.

        What someone else has put in the place of a replacement stays.
        """
        back = [(each.new, each.original) for each in self.replaced if each.everywhere]
        while self.replaced:
            _, place, original, new, _ = self.replaced.pop()
            is_ours = place.holds() and place.get() is new
            if original is NOTHING:
                if is_ours:
                    place.remove()
                continue
            if is_ours:
                place.put(original)
        _exchange(back)

    @contextmanager
    def during(self, replacements: Iterable[Change], *, strict: bool) -> Iterator[PatchReport]:
        """Like `apply`, for a with block; what was replaced before it stays so after it."""
        was_applied = self.applied
        report = self.apply(replacements, strict=strict)
        try:
            yield report
        finally:
            if not was_applied:
                self.undo()

    def _row(self, wanted: Change) -> PatchRow:
        if isinstance(wanted, Replacement):
            return self._replace(wanted)
        return self._add(wanted) if isinstance(wanted, Addition) else wanted

    def _add(self, wanted: Addition) -> PatchRow:
        target = wanted.target
        try:
            place = find(target)
        except Exception as error:
            # As in `_replace`.
            return PatchRow(target, "missing", f"{type(error).__name__}: {error}")
        if place.holds():
            is_there = place.get() is wanted.value
            return PatchRow(target, "added" if is_there else "refused", "there is one of this name")
        place.put(wanted.value)
        self.replaced.append(Replaced(target, place, NOTHING, wanted.value, everywhere=False))
        return PatchRow(target, "added", "")

    def _replace(self, wanted: Replacement) -> PatchRow:
        target = wanted.target
        try:
            place = find(target)
            original = place.get()
        except Exception as error:
            # An import may fail in any way: lazy modules raise RuntimeError.
            return PatchRow(target, "missing", f"{type(error).__name__}: {error}")
        try:
            new = wanted.make(original)
        except Refused as refusal:
            return PatchRow(target, "refused", str(refusal))
        if wanted.everywhere:
            _check_that_nobody_holds(new, target)
        place.put(new)
        self.replaced.append(Replaced(target, place, original, new, wanted.everywhere))
        return PatchRow(target, "replaced", "")


def replaced_by(target: str, function: Callable[..., Any]) -> Replacement:
    """A replacement by a function that does not need the original.

    What stands in the place is a copy: it is what stands there and nowhere else, which `undo` asks
    for.
    """

    def copy(_original: Any) -> Any:
        assert isinstance(function, FunctionType)
        parts = function.__code__, function.__globals__, function.__name__, function.__defaults__
        return FunctionType(*parts, function.__closure__)

    return Replacement(target, copy)


def words_in(variable: str, legal: Sequence[str]) -> list[str] | None:
    """The words, separated by commas, of an environment variable; None if it is not set.

    What is not legal is logged as a warning: who reads this has nobody to raise to.
    """
    text = os.environ.get(variable)
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in legal:
            logger.warning("fastpg: %s has %r, must be of %s", variable, word, ", ".join(legal))
    return [word for word in words if word in legal]


def find(target: str) -> Place:
    """Where a target is. The modules that its name begins with are imported.

    Raises:
        ImportError: Its module is not there, or cannot be imported.
        AttributeError: A name in it is not there.
    """
    path, _, key = target.removesuffix("]").partition("[")
    names = path.split(".")
    owner: Any = import_module(names[0])
    for i, name in enumerate(names[1:] if key else names[1:-1], start=2):
        # A module that is being imported is not a name in its package yet.
        module = ".".join(names[:i])
        owner = getattr(owner, name) if hasattr(owner, name) else import_module(module)
    return Place(owner, key or names[-1])


def _exchange(pairs: Sequence[tuple[Any, Any]]) -> dict[int, list[str]]:
    """Puts the second of a pair wherever a module has the first as a global.

    Returns:
        The names of those globals, by the id of the first.
    """
    new = {id(old): each for old, each in reversed(pairs)}
    found: dict[int, list[str]] = {place: [] for place in new}
    if not pairs:
        return found
    for name, module in _modules():
        for key, value in list(vars(module).items()):
            if id(value) in new:
                setattr(module, key, new[id(value)])
                found[id(value)].append(f"{name}.{key}")
    return found


def _check_that_nobody_holds(new: Any, target: str) -> None:
    """Raises ValueError if a module has what is to stand for a target as a global of its own.

    `undo` could not tell that global from those that the replacement made.
    """
    for name, module in list(sys.modules.items()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is new:
                raise ValueError(
                    f"{target}: {name}.{key} is what would stand for it; make a copy of it"
                )


def _modules() -> Sequence[tuple[str, Any]]:
    """All modules but fastpg's own, whose functions are what others are replaced by.

    sys.modules may hold None, and things of other kinds.
    """
    return [
        (name, each)
        for name, each in list(sys.modules.items())
        if name.partition(".")[0] != "fastpg" and hasattr(each, "__dict__")
    ]
