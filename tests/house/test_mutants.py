"""The seeded faults of `make mutants` fit the files that they are put into."""

from collections import Counter
from pathlib import Path

from tests.mutants.run import all_mutants

ROOT = Path(__file__).parents[2]


def test_the_text_of_every_fault_is_in_its_file_once():
    """A fault whose text is gone would no longer be put in."""
    found = {
        mutant.name: (ROOT / mutant.file).read_text().count(mutant.old) for mutant in all_mutants()
    }
    assert {name: count for name, count in found.items() if count != 1} == {}


def test_every_fault_has_a_name_and_tests_of_its_own():
    mutants = all_mutants()
    assert max(Counter(mutant.name for mutant in mutants).values()) == 1
    for mutant in mutants:
        files = [name.partition("::")[0] for name in mutant.tests if name.startswith("tests/")]
        assert files and all((ROOT / name).exists() for name in files), mutant.name
