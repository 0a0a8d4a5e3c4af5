"""Sample inputs of tests and benchmarks, most of which are installed with the package."""

from fastpg.bench.inputs import generator, head_and_labels, logits_and_labels

__all__ = ["DEVICE", "generator", "head_and_labels", "logits_and_labels"]

# The implementations that cannot raise about a value without waiting for the device.
DEVICE = ("triton", "cuda")
