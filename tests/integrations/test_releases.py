"""The integrations on the packages that they are for, as released.

`make .integrations/trl-1.16.0` lays one release beside the environment. Its tests are those of
`with_trl`, and run in a process of their own: only there is the package to be found.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDERS = ROOT / ".integrations"

# `make test-integrations` tests them all, the suite these.
ORDINARY = ["openrlhf-0.11.2", "trl-1.16.0", "verl-0.9.1"]
ALL = sorted(path.stem for path in (HERE / "releases").glob("*-*.txt"))
RELEASES = ALL if os.environ.get("FASTPG_TEST_RELEASES") == "all" else ORDINARY


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_the_integration_on_the_released_package(release):
    if not (FOLDERS / release).exists():
        pytest.skip(f"make .integrations/{release}")
    tests = HERE / f"with_{release.partition('-')[0]}"
    folders = [FOLDERS / name / "site-packages" for name in (release, "datasets")]
    result = subprocess.run(
        # The warnings are those of other packages among themselves.
        [sys.executable, "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider", str(tests)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *folders]))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
