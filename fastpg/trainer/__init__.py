"""A thin PPO trainer for Hugging Face causal language models, on fastpg's ops."""

from fastpg.trainer.config import InputError, PPOConfig
from fastpg.trainer.trainer import PPOTrainer

__all__ = ["InputError", "PPOConfig", "PPOTrainer"]
