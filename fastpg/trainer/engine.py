"""The accelerator of a run."""

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from fastpg.trainer.ranges import MixedPrecision


def make_accelerator(mixed_precision: MixedPrecision, output_dir: str) -> Accelerator:
    """Make the accelerator of a run, whose results depend on the settings alone.

    Which devices and processes there are, and how they share the model, is left to `accelerate`
    and its environment variables.

    Args:
        mixed_precision: The autocast dtype of the forward: "no", "bf16" or "fp16".
        output_dir: The directory of the run, for TensorBoard.
    """
    # What is not given here, `accelerate launch` may set: a number of accumulation steps, for one,
    # that every loss would be divided by.
    return Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        log_with="tensorboard",
        project_dir=output_dir,
    )
