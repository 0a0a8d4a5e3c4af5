"""The checks of a run, in the order in which they are made, and what is printed of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from fastpg.trainer.check import of_forwards, of_learning, of_rollouts
from fastpg.trainer.check.evidence import Evidence, Finding, Verdict, modes_of

if TYPE_CHECKING:
    from fastpg.trainer.trainer import PPOTrainer

Check = Callable[[Evidence], Finding | None]
"""It returns None where it does not apply."""

CHECKS: tuple[Check, ...] = (
    of_rollouts.padding_token,
    of_rollouts.beginning,
    of_rollouts.chat_template,
    of_rollouts.vocabulary,
    of_rollouts.completions_mask,
    of_rollouts.truncated,
    of_rollouts.sampled_distribution,
    of_rollouts.ends,
    of_rollouts.modes_after_sampling,
    of_forwards.dropout,
    of_forwards.padding,
    of_forwards.lm_head,
    of_forwards.shared_prompts,
    of_forwards.temperature,
    of_forwards.first_ratio,
    of_forwards.reference,
    of_learning.rewards,
    of_learning.groups,
    of_learning.score_position,
    of_learning.advantage_estimation,
    of_learning.advantages,
    of_learning.values,
    of_learning.learning_rate,
    of_learning.trained_weights,
    of_learning.gradient,
    of_learning.micro_batches,
    of_learning.seeds,
    of_learning.resuming,
)
"""All checks. The last one trains."""

_SEVERITY: tuple[Verdict, ...] = ("pass", "warn", "fail")


def gather_evidence(trainer: "PPOTrainer") -> Evidence:
    """Roll out once, as in the first step of a run.

    Args:
        trainer: A trainer that has not trained.

    Returns:
        The rollout and its credit.
    """
    trainer.seed()
    examples = next(iter(trainer.loader))
    before = modes_of(trainer.model)
    rollout, episodes = trainer.roll_out(examples)
    after = modes_of(trainer.model)
    experience, credit = trainer.learner.experience(rollout, episodes.scores)
    other_modes = [name for name in before if before[name] != after[name]]
    return Evidence(trainer, examples, rollout, episodes, experience, credit, other_modes)


def find_all(trainer: "PPOTrainer") -> list[Finding]:
    """Make every check that applies; every process has to call this.

    Args:
        trainer: A trainer that has not trained. It cannot train afterwards.

    Returns:
        The findings, each that of the process where it is worst.
    """
    evidence = gather_evidence(trainer)
    findings = []
    for check in CHECKS:
        finding = check(evidence)
        if finding is not None:
            everywhere = gather_object([finding])
            findings.append(max(everywhere, key=lambda found: _SEVERITY.index(found.verdict)))
    return findings


def check_run(trainer: "PPOTrainer") -> int:
    """Make every check and print a line for each.

    Args:
        trainer: A trainer that has not trained. It cannot train afterwards.

    Returns:
        The exit code: 1 if a check fails, else 0.
    """
    findings = find_all(trainer)
    verdicts = [finding.verdict for finding in findings]
    if trainer.accelerator.is_main_process:
        for finding in findings:
            print(line_of(finding))
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in _SEVERITY)
        print(f"{counts}; of {len(CHECKS)} checks {len(CHECKS) - len(findings)} do not apply.")
    return 1 if "fail" in verdicts else 0


def line_of(finding: Finding) -> str:
    """Return a finding as a line; what to do about it is at its end."""
    text = f"{finding.verdict}  {finding.name:<15}  {finding.measured}"
    return text if finding.verdict == "pass" else f"{text} - {finding.advice}."
