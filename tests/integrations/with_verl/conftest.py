"""These tests are collected where verl is: see test_releases.py."""

from importlib.util import find_spec

from stubs import stub

collect_ignore_glob = [] if find_spec("verl") else ["test_*.py"]
stub("ray")
