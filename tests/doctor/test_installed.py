"""`fastpg doctor` prints what is installed, and names what is missing for what."""

import importlib.util
from pathlib import Path

import pytest
import torch

import fastpg
from fastpg.cli import main
from fastpg.doctor import installed


def test_the_command_prints_versions_kernels_threads_and_the_allocator(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("op ") and "policy_loss" in said
    assert f"C++ extension: {fastpg.extension_status()}" in said
    assert f"torch         {torch.__version__}" in said
    assert f"threads       {torch.get_num_threads()} of " in said
    assert f"allocator     {installed.allocator()}" in said


def test_what_is_missing_is_named_with_its_use(monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"peft", "accelerate", "yaml", "trl"}
    monkeypatch.setattr(
        installed, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    missing = "\n".join(installed.missing_parts())
    assert "peft, for LoRA in the trainer: pip install peft" in missing
    assert "accelerate, pyyaml, for fastpg train" in missing
    assert "fastpg doctor mismatch: pip install accelerate pyyaml\n" in missing
    assert "trl, for fastpg.integrations.trl: pip install trl" in missing
    assert "transformers," not in missing


def test_a_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(fastpg, "extension_status", lambda: "not loaded (no such file)")
    assert installed.missing_parts()[0].startswith("C++ kernels: every op runs on its PyTorch")


@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc"])
def test_an_allocator_that_is_preloaded_is_named(monkeypatch, name):
    maps = f"7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/lib{name}.so.2\n"
    monkeypatch.setattr(Path, "read_text", lambda self: maps)
    assert installed.allocator() == name
