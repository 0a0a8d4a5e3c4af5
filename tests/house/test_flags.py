import pytest
import torch

from fastpg import _library, check
from fastpg._flags import label_flag, record_labels

GPU = torch.device("cuda", 0)  # which need not be there


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


def test_a_capture_makes_no_flag(monkeypatch):
    """It would lie in the memory of the graph, and hold anything until the first replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="some_op: call it once on cuda:0 before a CUDA graph"):
        label_flag("some_op", GPU)
    label_flag("some_op", torch.device("cpu"))


def test_a_number_is_sent_to_a_gpu_once_a_stream(monkeypatch):
    """Each would be a launch. What a capture makes is the graph's, and is not kept."""
    made, now = [], {"stream": 1, "capturing": False}

    def scalar_tensor(value, *, dtype, device):
        made.append(value)
        return torch.tensor(value, dtype=dtype)

    monkeypatch.setattr(torch, "scalar_tensor", scalar_tensor)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda _: now["stream"], raising=False
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    _library._kept_scalar.cache_clear()

    def launches(value, **changed):
        now.update(changed)
        made.clear()
        assert _library.scalar(value, torch.float32, GPU) == torch.tensor(value)
        return len(made)

    assert [launches(0.7), launches(0.7), launches(0.9), launches(0.7)] == [1, 0, 1, 0]
    assert [launches(0.7, stream=2), launches(0.7)] == [1, 0]
    assert [launches(0.7, capturing=True), launches(0.7)] == [1, 1]
    _library._kept_scalar.cache_clear()
