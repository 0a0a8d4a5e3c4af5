"""Runs code as soon as a module is imported, without importing it.

This file stands beside the package and not in it: Ray imports a setup hook in each of its worker
processes, and `import fastpg` would bring torch into all of them.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

Action = Callable[[], object]


def when_imported(module: str, action: Action) -> None:
    """Runs an action when a module is imported: right away, if it is.

    What imports the module goes on after the action, so that `from module import name` gets what
    the action has put there. An action that raises is logged as a warning, and the import goes on.

    Args:
        module: The full name of the module.
        action: It is called once, without arguments.
    """
    if module in sys.modules:
        _run(module, action)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.actions.setdefault(module, []).append(action)


def openrlhf() -> None:
    """Patches OpenRLHF in this process, once it is imported: the setup hook of Ray's workers.

    FASTPG_OPENRLHF says what to replace, as in `fastpg.integrations.openrlhf`.

    Example:
        ray.init(runtime_env={"worker_process_setup_hook": "fastpg_hooks.openrlhf"})
    """
    for name in ("models.utils", "models.actor", "trainer.ppo_utils.experience_maker"):
        when_imported(f"openrlhf.{name}", partial(_patch_openrlhf, f"openrlhf.{name}"))


def _patch_openrlhf(module: str) -> None:
    from fastpg.integrations.openrlhf import patch_module

    patch_module(module)


def _run(module: str, action: Action) -> None:
    try:
        action()
    except Exception:
        message = "fastpg: what was to be done at the import of %s failed"
        logging.getLogger("fastpg").warning(message, module, exc_info=True)


class _Finder(MetaPathFinder):
    """Finds nothing itself; gives the modules that are waited for a loader that tells of them."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        # Without its actions in the table this finder passes, and the next ones are asked.
        actions = self.actions.pop(fullname, None)
        if actions is None:
            return None
        try:
            spec = find_spec(fullname)
        finally:
            # They stay until the module is loaded: whoever asks may only want to know of it.
            self.actions[fullname] = actions
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, and then runs the actions."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps no trace of this loader: others ask its own for sources and resources.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        for action in _finder.actions.pop(module.__name__, []):
            _run(module.__name__, action)


_finder = _Finder()
