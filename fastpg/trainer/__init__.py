"""A thin policy-gradient trainer for Hugging Face causal language models, on fastpg's ops.

A step goes from `data` (prompts) by `rollouts` (completions) and `rewards` (what they earn) to
`learning` (credit, loss and optimiser). `models` has the policy, its reference and its critic,
`settings` what the user asked for, `run` the processes and the files, `report` what is shown.
`trainer` and `own_loop` put them together.
"""

from fastpg.trainer.data.datasets import load_prompts
from fastpg.trainer.report.callbacks import TrainerCallback
from fastpg.trainer.rewards.reward_model import RewardModel
from fastpg.trainer.rewards.reward_trainer import RewardConfig, RewardTrainer
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError
from fastpg.trainer.trainer import PPOTrainer

__all__ = [
    "InputError",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "TrainerCallback",
    "load_prompts",
]
