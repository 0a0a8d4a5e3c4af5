"""What a user reads in an editor: every public docstring is complete, and its example runs."""

import doctest
import inspect
import typing

import pytest
import torch

import fastpg

PUBLIC = {name: getattr(fastpg, name) for name in fastpg.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
# These take nothing and compute nothing.
WITHOUT_ARGUMENTS = {"check", "extension_status", "kernels_of"}
OPS = {name: value for name, value in FUNCTIONS.items() if name not in WITHOUT_ARGUMENTS}


@pytest.mark.parametrize("name", OPS)
def test_a_docstring_has_every_section(name):
    text = inspect.getdoc(OPS[name])
    for section in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
        assert f"\n{section}\n" in text, section
    assert text.split("\n\n")[0].count("\n") == 0, "the summary is one line"


@pytest.mark.parametrize("name", OPS)
def test_every_argument_is_described_by_name(name):
    text = inspect.getdoc(OPS[name])
    described = text.partition("\nArgs:\n")[2].partition("\nReturns:\n")[0]
    for argument in inspect.signature(OPS[name]).parameters:
        assert f"    {argument}: " in described, argument


@pytest.mark.parametrize("name", OPS)
def test_the_legal_strings_are_in_the_type_and_in_the_text(name):
    hints = typing.get_type_hints(OPS[name])
    text = inspect.getdoc(OPS[name])
    for argument in inspect.signature(OPS[name]).parameters:
        kinds = (hints[argument], *typing.get_args(hints[argument]))
        assert str not in kinds, f"{argument} is any string; Literal tells which are legal"
        if typing.get_origin(hints[argument]) is typing.Literal:
            for legal in typing.get_args(hints[argument]):
                assert f'"{legal}"' in text, legal


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_prints_what_it_says(name):
    torch.use_deterministic_algorithms(True)
    found = doctest.DocTestFinder(recurse=False).find(
        PUBLIC[name], name, globs={"torch": torch, "fastpg": fastpg}
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output = []
    for test in found:
        if name in OPS:
            assert test.examples, "there is no example"
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
