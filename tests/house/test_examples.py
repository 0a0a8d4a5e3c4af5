"""The examples run, and do what their first lines say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gridworld_is_learned_by_all_three():
    world = load("gridworld")
    for algorithm in world.ALGORITHMS.values():
        curve = world.train(algorithm, world.Room(4), 16, lr=0.02, critic_lr=0.02)
        assert sum(curve[-3:]) / 3 > 80 > curve[0]


def test_gridworld_prints_its_table_and_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out" / "gridworld.png"
    curves = load("gridworld").main(["--iterations", "2", "--seeds", "1", "--out", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert list(curves) == ["REINFORCE", "vanilla policy gradient", "PPO"]
    assert all(f"\n{name} " in printed for name in curves)
