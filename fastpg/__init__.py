"""fastpg: fused kernels for policy-gradient training of language models."""

from ._library import extension_status, kernels_of
from .ops.gae import gae
from .ops.token_logprobs import token_logprobs

__version__ = "0.1.0"
__all__ = ["extension_status", "gae", "kernels_of", "token_logprobs"]
