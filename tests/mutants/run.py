"""make mutants: puts each fault into a copy of the tree, runs its tests, tells which survived.

    python -m tests.mutants.run [--only WORD] [--jobs 2]

A fault in C++ is compiled first. The table goes to the screen as it grows. The exit code is 1 if a
fault survived that is not marked as harmless, or if its text is not in the file exactly once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import tests.mutants
from tests.mutants import Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("fastpg", "csrc", "tests", "bench", "docs", "examples")
FILES = ("setup.py", "pyproject.toml", "README.md")
LIMIT = 900  # seconds for the tests of one fault; one that hangs them counts as caught


def all_mutants() -> list[Mutant]:
    """The faults of every list in this folder."""
    names = [module.name for module in pkgutil.iter_modules(tests.mutants.__path__)]
    lists = [importlib.import_module(f"tests.mutants.{name}") for name in names if name != "run"]
    return [mutant for module in lists for mutant in module.MUTANTS]


def failed_test(output: str) -> str:
    """The name of the first test that pytest's output says has failed."""
    failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" ", 1)[1].partition(" - ")[0] if failed else "a test"


class Tree:
    """A copy of the project in which one fault at a time is put."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (ROOT / name).exists():
                shutil.copytree(
                    ROOT / name, folder / name, ignore=shutil.ignore_patterns("results")
                )
        for name in FILES:
            shutil.copy2(ROOT / name, folder / name)
        self.run("git", "init", "--quiet")  # some tests ask which files are the project's
        self.is_built = self.build()

    def run(self, *command: str, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
        """Runs a command in the copy, with one thread, so that copies do not disturb each other."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder)}
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )

    def build(self) -> bool:
        """Compiles the extension for the CPU; CUDA C++ is compiled by the tests that play it."""
        environment = {"FASTPG_CUDA": "0", "FASTPG_STRICT": "1"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=self.folder, env=os.environ | environment, capture_output=True
        )
        return done.returncode == 0

    def verdict(self, mutant: Mutant) -> str:
        """caught, SURVIVED, or what is wrong with the fault itself."""
        path = self.folder / mutant.file
        before = path.read_text()
        if before.count(mutant.old) != 1:
            return f"STALE: its text occurs {before.count(mutant.old)} times in {mutant.file}"
        compiled = mutant.file.startswith("csrc/") and not mutant.file.endswith(".cu")
        path.write_text(before.replace(mutant.old, mutant.new))
        try:
            if compiled or not self.is_built:
                self.is_built = self.build()
            if not self.is_built:
                return "STALE: it does not compile"
            test = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist"]
            done = self.run(*test, *mutant.tests)
        except subprocess.TimeoutExpired:
            return "caught (it hung)"
        finally:
            path.write_text(before)
            if compiled:
                self.is_built = False  # it is compiled again before the next fault is judged
        if done.returncode == 1:
            return f"caught by {failed_test(done.stdout)}"
        if done.returncode == 0:
            return f"harmless: {mutant.harmless}" if mutant.harmless else "SURVIVED"
        return f"STALE: pytest ended with {done.returncode}\n{done.stdout[-600:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of the faults to run")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree that run at a time")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in all_mutants() if arguments.only in mutant.name]
    if not mutants:
        parser.error(f"no fault has {arguments.only!r} in its name")
    with tempfile.TemporaryDirectory() as folder:
        trees: Queue[Tree] = Queue()
        for number in range(arguments.jobs):
            trees.put(Tree(Path(folder, str(number))))

        def judge(mutant: Mutant) -> str:
            tree, begin = trees.get(), time.perf_counter()
            verdict = tree.verdict(mutant)
            trees.put(tree)
            print(f"{mutant.name:60} {time.perf_counter() - begin:5.0f} s  {verdict}", flush=True)
            return verdict

        with ThreadPoolExecutor(arguments.jobs) as pool:
            verdicts = list(pool.map(judge, mutants))
    caught = sum(verdict.startswith("caught") for verdict in verdicts)
    harmless = sum(verdict.startswith("harmless") for verdict in verdicts)
    print(f"{caught} of {len(verdicts)} caught, {harmless} harmless")
    return int(caught + harmless < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
