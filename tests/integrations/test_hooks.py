"""What runs when a module is imported."""

import importlib
import importlib.util
import logging
import subprocess
import sys

import pytest

import fastpg_hooks
from fastpg.integrations import openrlhf
from fastpg_hooks import when_imported


@pytest.fixture
def cottage(tmp_path, monkeypatch):
    """A package whose module `door` takes a name from its module `key`."""
    package = tmp_path / "cottage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "key.py").write_text("shape = 'stock'\n")
    (package / "door.py").write_text("from .key import shape\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "cottage"]:
        del sys.modules[name]
    fastpg_hooks._finder.actions.clear()


def put_ours():
    sys.modules["cottage.key"].shape = "ours"


def test_an_action_runs_before_others_take_names_from_the_module(cottage):
    when_imported("cottage.key", put_ours)
    assert "cottage" not in sys.modules
    door = importlib.import_module("cottage.door")
    assert door.shape == "ours"
    key = sys.modules["cottage.key"]
    assert key.__spec__.loader is key.__loader__
    assert type(key.__loader__) is type(door.__loader__)


def test_an_action_on_a_module_that_is_there_runs_at_once(cottage):
    key = importlib.import_module("cottage.key")
    when_imported("cottage.key", put_ours)
    assert key.shape == "ours"


def test_actions_run_once_each_and_in_their_order(cottage):
    calls = []
    when_imported("cottage.key", lambda: calls.append(1))
    when_imported("cottage.key", lambda: calls.append(2))
    importlib.reload(importlib.import_module("cottage.key"))
    assert calls == [1, 2]


def test_whoever_only_looks_for_a_module_leaves_its_actions(cottage):
    when_imported("cottage.key", put_ours)
    assert importlib.util.find_spec("cottage.key").name == "cottage.key"
    assert importlib.import_module("cottage.key").shape == "ours"


def test_an_import_that_fails_leaves_the_actions_for_the_next(cottage):
    (cottage / "key.py").write_text("import cottage.no_such_thing\n")
    when_imported("cottage.key", put_ours)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("cottage.key")
    (cottage / "no_such_thing.py").write_text("")
    importlib.invalidate_caches()
    assert importlib.import_module("cottage.key").shape == "ours"


def test_an_action_that_raises_is_a_warning_and_the_import_goes_on(cottage, caplog):
    when_imported("cottage.key", lambda: 1 / 0)
    with caplog.at_level(logging.WARNING, logger="fastpg"):
        assert importlib.import_module("cottage.key").shape == "stock"
    assert "cottage.key failed" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_module_that_is_not_there_is_missed_as_without_the_hook(cottage):
    when_imported("cottage.cellar", put_ours)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'cottage\.cellar'"):
        importlib.import_module("cottage.cellar")
    (cottage / "cellar.py").write_text("")
    importlib.invalidate_caches()
    calls = []
    when_imported("cottage.cellar", lambda: calls.append(1))
    when_imported("cottage.key", put_ours)
    importlib.import_module("cottage.key")
    importlib.import_module("cottage.cellar")
    assert calls == [1]


def test_a_release_of_openrlhf_that_is_not_tested_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(openrlhf._patches, "version", lambda: "0.12.0")
    monkeypatch.setenv(openrlhf.VARIABLE, "entropy")
    openrlhf.patch_module(openrlhf.ACTOR)  # nothing is wanted of it
    assert not caplog.text
    openrlhf.patch_module(openrlhf.UTILS)
    openrlhf.unpatch()
    assert "fastpg is tested with openrlhf 0.11" in caplog.text


def test_a_setup_hook_of_ray_imports_nothing_heavy():
    code = (
        "import sys, fastpg_hooks\n"
        "fastpg_hooks.openrlhf()\n"
        "print({'torch', 'fastpg', 'openrlhf'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
