"""A thin policy-gradient trainer for Hugging Face causal language models, on fastpg's ops."""

from fastpg.trainer.config import PPOConfig
from fastpg.trainer.parsing import InputError
from fastpg.trainer.trainer import PPOTrainer

__all__ = ["InputError", "PPOConfig", "PPOTrainer"]
