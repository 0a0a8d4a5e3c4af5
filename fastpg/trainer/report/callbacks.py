"""What users let a run call while it goes on."""

from pathlib import Path


class TrainerCallback:
    """Is told of the steps, evaluations and checkpoints of a run, on the main process.

    Each method does nothing until a subclass says otherwise. What one raises ends the run, of which
    checkpoint and model are saved first, where there is one process.

    Example:
        >>> from fastpg.trainer import TrainerCallback
        >>> class Best(TrainerCallback):
        ...     reward = float("-inf")
        ...
        ...     def on_evaluate(self, step, metrics):
        ...         self.reward = max(self.reward, metrics["eval/reward/mean"])
        >>> best = Best()  # PPOTrainer(..., callbacks=[best])
    """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Hear of a step that is recorded.

        Args:
            step: Its number, from 1.
            metrics: Its line in `metrics.jsonl`, but for "step".
        """

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """Hear of an evaluation that is recorded.

        Args:
            step: The step before it; 0 for the starting model.
            metrics: Its metrics, whose names begin with "eval/".
        """

    def on_save(self, step: int, directory: Path) -> None:
        """Hear of a checkpoint that was due, or of the trained model, on the disk.

        Args:
            step: The step before it.
            directory: `checkpoint-N`, which `save_total_limit` may remove later, or `model`.
        """
