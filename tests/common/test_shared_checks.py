"""The checks and conversions that several ops share."""

import pytest
import torch

from fastpg import gae, token_weights, whiten
from fastpg.ops.common.checks import alike, segments


def test_any_fp64_tensor_makes_all_of_them_fp64():
    x, y = torch.ones(2), torch.ones(2, dtype=torch.float64)
    for first, second in ((x, y), (y, x), (x.bfloat16(), y), (y, None)):
        converted = alike("op", ("second",), first=first, second=second)
        assert all(z is None or z.dtype is torch.float64 for z in converted)


def test_half_precision_is_computed_in_fp32():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(2, dtype=dtype)
        for tensors in ((x, x), (x, torch.ones(2))):
            first, second = alike("op", first=tensors[0], second=tensors[1])
            assert first.dtype is second.dtype is torch.float32


def test_a_token_belongs_to_the_sequence_that_begins_with_it():
    """An empty sequence has none."""
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert segments(cu_seqlens, torch.empty(5)).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_mask_of_any_dtype_keeps_the_same_tokens(dtype):
    mask = torch.tensor([[1, 1, 0]]).to(dtype)
    assert token_weights(mask).tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, 0.5])
def test_a_mask_that_is_added_to_scores_is_refused(value):
    """0 where a token is kept, -inf where it is not: the opposite of a mask of 0 and 1."""
    x, mask = torch.ones(1, 3), torch.tensor([[0.0, 0.0, value]])
    for call in (lambda: gae(x, x, mask), lambda: whiten(x, mask), lambda: token_weights(mask)):
        with pytest.raises(ValueError, match="mask must be bool or 0/1, holds"):
            call()
