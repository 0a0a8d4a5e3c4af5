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

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

State = Literal["replaced", "missing", "refused"]


class Refused(Exception):
    """Raised by `Replacement.make` for an original that it cannot stand for; says why."""


class PatchError(RuntimeError):
    """Something was not replaced, and strict=True. Then nothing is."""


class Replacement(NamedTuple):
    """What is to be replaced, and by what.

    target: "package.module.name", "package.module.Class.method" or "package.module.REGISTRY[key]".
    make: Takes the original, returns what replaces it. It may raise `Refused`.
    everywhere: Whether a global is replaced in every module that holds it, or where `target` says.
    """

    target: str
    make: Callable[[Any], Any]
    everywhere: bool = True


class PatchRow(NamedTuple):
    """What became of one target."""

    target: str
    state: State  # missing: there is no such name here
    reason: str  # of "replaced": where it was


class PatchReport(NamedTuple):
    """What was replaced, what was not, and why."""

    package: str
    version: str | None  # None: it is not installed
    rows: list[PatchRow]  # a call that is left to the package later adds one

    @property
    def complete(self) -> bool:
        """Whether everything was replaced."""
        return all(row.state == "replaced" for row in self.rows)

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

    def put(self, value: Any) -> None:
        """Puts something else there."""
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)

    def _names(self) -> Any:
        return self.owner if isinstance(self.owner, dict) else vars(self.owner)


class Replaced(NamedTuple):
    """An original and what stands in its place."""

    place: Place
    original: Any
    new: Any


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

    def apply(self, replacements: Iterable[Replacement | PatchRow], *, strict: bool) -> PatchReport:
        """Makes the replacements, one after another.

        Args:
            replacements: What to replace. A `PatchRow` stands for one that the caller refuses.
            strict: Whether to raise unless everything was replaced.

        Returns:
            A row for each. Where something is replaced already, nothing changes, and each says so.

        Raises:
            PatchError: strict, and a row is not "replaced". Then nothing is replaced.
        """
        was_applied = self.applied
        rows: list[PatchRow] = []
        installed = self.version()
        if installed is None:
            rows.append(PatchRow(self.package, "missing", "the package is not installed"))
        else:
            for each in replacements:
                if isinstance(each, PatchRow):
                    rows.append(each)
                elif was_applied:
                    rows.append(PatchRow(each.target, "refused", "already patched: unpatch first"))
                else:
                    rows.append(self._replace(each))
        report = PatchReport(self.package, installed, rows)
        if not was_applied:
            self.rows, self.strict = rows, strict
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
        while self.replaced:
            place, original, new = self.replaced.pop()
            if place.get() is new:
                place.put(original)
            _exchange(new, original)

    @contextmanager
    def during(
        self, replacements: Iterable[Replacement | PatchRow], *, strict: bool
    ) -> Iterator[PatchReport]:
        """Like `apply`, for a with block; what was replaced before it stays so after it."""
        was_applied = self.applied
        report = self.apply(replacements, strict=strict)
        try:
            yield report
        finally:
            if not was_applied:
                self.undo()

    def _replace(self, wanted: Replacement) -> PatchRow:
        target = wanted.target
        try:
            place = find(target)
            original = place.get()
        except (ImportError, AttributeError, KeyError) as error:
            return PatchRow(target, "missing", f"{type(error).__name__}: {error}")
        try:
            new = wanted.make(original)
        except Refused as refusal:
            return PatchRow(target, "refused", str(refusal))
        place.put(new)
        self.replaced.append(Replaced(place, original, new))
        others = _exchange(original, new) if wanted.everywhere else []
        return PatchRow(target, "replaced", f"and in {', '.join(others)}" if others else "")


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
        if not hasattr(owner, name):
            import_module(".".join(names[:i]))
        owner = getattr(owner, name)
    return Place(owner, key or names[-1])


def _exchange(old: Any, new: Any) -> list[str]:
    """Puts `new` wherever a module has `old` as a global; returns the names of those globals."""
    found = []
    for name, module in _modules():
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)
                found.append(f"{name}.{key}")
    return found


def _modules() -> Sequence[tuple[str, Any]]:
    """All modules that are imported. sys.modules may hold None, and things of other kinds."""
    return [(name, each) for name, each in list(sys.modules.items()) if hasattr(each, "__dict__")]
