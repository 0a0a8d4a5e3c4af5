"""The recipe of docs/plain_loops.md for Lightning."""

import torch
from plain_loops import assert_recipe_trains_as_a_plain_loop


def test_the_recipe_trains_as_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)  # some of the model's own kernels are not
    assert_recipe_trains_as_a_plain_loop("Lightning")
