"""Every op's tests run once per implementation: the reference, then C++ on each instruction set."""

import importlib
import pkgutil

import pytest
import torch

import fastpg.ops
from fastpg._library import _C, REFERENCES

_MODULES = pkgutil.iter_modules(fastpg.ops.__path__)
PAGES = [importlib.import_module(f"fastpg.ops.{module.name}") for module in _MODULES]
INSTRUCTION_SETS = _C.instruction_sets() if _C is not None else []


@pytest.fixture(autouse=True)
def deterministic():
    """Fills every `empty` with NaN, inside the kernels too: an unwritten output shows.

    One thread, unless a test asks for more: on a busy machine torch's threads spin.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def kernel(request, monkeypatch):
    """The implementation under test; the public function is called as a user would."""
    if request.param == "reference":
        for page in PAGES:
            for name, op in list(vars(page).items()):
                if isinstance(op, torch._ops.OpOverload):
                    monkeypatch.setattr(page, name, REFERENCES[op])
        yield request.param
    else:
        best = _C.instruction_set()
        _C.use_instruction_set(request.param)
        yield request.param
        _C.use_instruction_set(best)
