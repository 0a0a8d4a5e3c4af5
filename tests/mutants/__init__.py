"""Faults to put into fastpg one at a time, to see whether the tests notice: `make mutants`."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault: a text of a file that occurs once in it, and what it is replaced by."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # the test files, or tests, that should fail
    harmless: str = ""  # why it changes nothing that could be tested, for a fault that cannot fail
