"""These tests are collected where torchtitan is: see test_releases.py."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

collect_ignore_glob = [] if find_spec("torchtitan") else ["test_*.py"]
if find_spec("torchtitan"):
    import torchtitan

    # Its RL losses are beside models that need vLLM, which the package imports first.
    package = ModuleType("torchtitan.experiments.rl")
    package.__path__ = [str(Path(next(iter(torchtitan.__path__)), "experiments/rl"))]
    sys.modules[package.__name__] = package
