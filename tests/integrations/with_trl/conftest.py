"""These tests are collected where TRL is: see test_releases.py."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("trl") else ["test_*.py"]
