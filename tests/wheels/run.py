"""make test-wheels and test-pythons: installs a wheel where there is no compiler, and runs it.

    python -m tests.wheels.run DIST [PYTHON_WITH_TORCH ...]

Every Python from 3.10 on that is here, on PATH or under pyenv, gets an empty environment, and runs
the extension's functions on arrays that stand for tensors (`without_torch`). Where a Python of the
same version has torch, which is large, that torch is lent to the environment, and the ops, what
serves them and `fastpg doctor` are checked too (`with_torch`). A source distribution in DIST is
built and run as well: without CUDA, and without any compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MINORS = range(10, 16)  # of the Pythons that are looked for
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
TORCH = "import sys, importlib.metadata as m; print(*sys.version_info[:2], m.version('torch'))"


def output(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """What a command prints. The run ends with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def find_python(minor: int) -> str | None:
    """A Python 3.<minor>."""
    under_pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
    return next(map(str, under_pyenv), None) or shutil.which(f"python3.{minor}")


class Environment:
    """An empty environment with a wheel, and neither a compiler nor any variable."""

    def __init__(self, python: str, wheel: Path, folder: Path) -> None:
        output(python, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin/python"
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        output(*pip, "install", "--quiet", "--no-deps", wheel)

    def lend(self, lender: str) -> None:
        """Adds the packages of a Python with torch after the environment's own."""
        Path(output(self.python, "-c", SITE), "lent.pth").write_text(output(lender, "-c", SITE))

    def run(self, script: str, *arguments: str) -> str:
        """The last line that a script of this folder prints."""
        alone = {"PATH": str(self.python.parent), "HOME": str(self.python.parent)}
        said = output(self.python, "-I", HERE / f"{script}.py", *arguments, env=alone)
        return said.splitlines()[-1]


def check_pythons(wheel: Path, with_torch: list[str], folder: Path) -> None:
    """Runs a wheel in every Python that is here, and with every torch."""
    lent = {tuple(output(python, "-c", TORCH).split()): python for python in with_torch}
    for minor in MINORS:
        if (python := find_python(minor)) is None:
            print(f"Python 3.{minor}: none here")
            continue
        environment = Environment(python, wheel, folder / f"python3.{minor}")
        print(f"Python 3.{minor}: {environment.run('without_torch')}", flush=True)
        for (_, of_minor, version), lender in lent.items():
            if of_minor == str(minor):
                environment.lend(lender)
                said = environment.run("with_torch", "C++")
                print(f"Python 3.{minor}, torch {version}: {said}", flush=True)


def check_source(archive: Path, served: str, settings: dict[str, str], folder: Path) -> None:
    """Builds the source distribution, and runs the wheel with this Python's torch."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    output(*pip, "--wheel-dir", folder, archive, env=os.environ | settings)
    (wheel,) = folder.glob("*.whl")
    environment = Environment(sys.executable, wheel, folder / "environment")
    environment.lend(sys.executable)
    said = environment.run("with_torch", served)
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    print(f"Source distribution, {words}: {said}", flush=True)


def main() -> None:
    """Checks the wheel and the source distribution of a folder."""
    parser = argparse.ArgumentParser(prog="make test-wheels", description=__doc__)
    parser.add_argument("dist", type=Path, help="where there is a wheel")
    parser.add_argument("pythons", nargs="*", help="Pythons with torch, besides this one")
    given = parser.parse_args()
    (wheel,) = given.dist.glob("*.whl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_pythons(wheel, [sys.executable, *given.pythons], folder)
        for archive in given.dist.glob("*.tar.gz"):
            compiled = {"FASTPG_CUDA": "0", "FASTPG_STRICT": "1"}
            check_source(archive, "C++", compiled, folder / "without CUDA")
            without = {"FASTPG_CUDA": "0", "CXX": "no-compiler"}
            check_source(archive, "reference", without, folder / "without a compiler")


if __name__ == "__main__":
    main()
