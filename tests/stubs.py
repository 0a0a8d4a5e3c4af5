"""Empty modules in place of packages that a trainer imports at its top and the tests do not use."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import ClassVar


def stub(*packages):
    """Makes an empty module importable in place of each package that is not installed."""
    Finder.packages.update(packages)
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())


class Finder:
    """Finds a stub for packages that are not installed."""

    packages: ClassVar[set[str]] = set()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        module.__path__ = []


class Stub(ModuleType):
    """A module in which every name is a class that can be called with anything."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, value)
        return value
