"""These tests are collected where SkyRL is: see test_releases.py."""

import sys
from importlib.util import find_spec

from stubs import Stub, stub

collect_ignore_glob = [] if find_spec("skyrl") else ["test_*.py"]
stub("ray", "skyrl_gym", "flash_attn", "s3fs", "cloudpathlib", "tensordict")
# pydantic refuses its types under Python 3.11, and no test has to do with them.
sys.modules["skyrl.tinker.types"] = Stub("skyrl.tinker.types")

import ray  # noqa: E402

# SkyRL registers its functions with an actor of Ray, if there is one.
ray.is_initialized = lambda: False
ray.remote = lambda cls: cls
