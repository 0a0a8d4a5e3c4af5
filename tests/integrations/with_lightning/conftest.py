"""These tests are collected where Lightning is: see test_releases.py."""

import sys
from importlib.util import find_spec
from pathlib import Path

collect_ignore_glob = [] if find_spec("lightning") else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parents[1]))
