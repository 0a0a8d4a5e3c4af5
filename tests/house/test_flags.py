import pytest
import torch

from fastpg import check
from fastpg._flags import record_labels


def test_labels_are_recorded_and_raised_once():
    check()
    labels = torch.tensor([[3, 9], [-7, 1]])
    record_labels("some_op", labels, labels < 0)
    record_labels("some_op", labels, labels > 5)
    record_labels("some_op", labels, labels > 99)
    record_labels("some_op", labels[:0], labels[:0] > 0)
    with pytest.raises(IndexError, match="some_op: labels holds -7 at row 2, and 1 more"):
        check()
    check()
