"""The accelerator of a run."""

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from fastpg.trainer.config import PPOConfig


def make_accelerator(args: PPOConfig) -> Accelerator:
    """Make the accelerator of a run, whose results depend on the settings alone.

    Which devices and processes there are, and how they share the model, is left to `accelerate`
    and its environment variables.

    Args:
        args: The settings of the run.
    """
    # What is not given here, `accelerate launch` may set: a number of accumulation steps, for one,
    # that every loss would be divided by.
    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        log_with="tensorboard",
        project_dir=args.output_dir,
    )
