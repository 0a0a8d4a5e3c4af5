"""A thin policy-gradient trainer for Hugging Face causal language models, on fastpg's ops."""

from fastpg.trainer.callbacks import TrainerCallback
from fastpg.trainer.config import PPOConfig
from fastpg.trainer.parsing import InputError
from fastpg.trainer.reward_model import RewardModel
from fastpg.trainer.reward_trainer import RewardConfig, RewardTrainer
from fastpg.trainer.trainer import PPOTrainer

__all__ = [
    "InputError",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "TrainerCallback",
]
