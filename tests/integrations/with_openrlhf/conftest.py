"""These tests are collected where OpenRLHF is: see test_releases.py."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("openrlhf") else ["test_*.py"]
