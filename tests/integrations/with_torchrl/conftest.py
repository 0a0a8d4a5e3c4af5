"""These tests are collected where torchrl is: see test_releases.py."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torchrl") else ["test_*.py"]
