"""Faults of what keeps a run safe and small: files, signals, callbacks, memory, parts of steps."""

from . import Mutant

ASIDE = ("tests/trainer/test_memory.py",)
BUDGET = ("tests/trainer/test_micro_batches.py",)
CHECKPOINTS = "tests/trainer/test_checkpoint.py"
INTERRUPTIONS = "tests/trainer/test_interruptions.py"
SIGNALLED = tuple(
    f"{INTERRUPTIONS}::test_a_signal_{what}"
    for what in (
        "saves_checkpoint_and_model",
        "that_the_process_ignores_stays_ignored",
        "in_an_update_waits_for_its_end",
    )
)
DIRECTORIES = ("tests/trainer/test_directories.py",)
OWN_LOOPS = ("tests/trainer/test_own_loop.py",)
OPTIONS = ("tests/trainer/test_training_options.py",)
PROCESSES = ("tests/trainer/test_trainer_processes.py::test_two_processes_make_the_step_of_one",)
REWARDS = ("tests/trainer/test_rewards.py",)
SETS = ("tests/trainer/test_kept_sets.py",)
STRINGS = ("tests/trainer/test_stop_strings.py",)
ENGINE = "fastpg/trainer/run/engine.py"
LEARNER = "fastpg/trainer/learning/learner.py"
MEMORY = "fastpg/trainer/models/memory.py"
MICRO_BATCHES = "fastpg/trainer/learning/micro_batches.py"
OWN_LOOP = "fastpg/trainer/own_loop.py"
RUN_FILES = "fastpg/trainer/run/run_files.py"
SAVER = "fastpg/trainer/saver.py"
SIGNALS = "fastpg/trainer/run/signals.py"
STOP_STRINGS = "fastpg/trainer/rollouts/stop_strings.py"
TRAINER = "fastpg/trainer/trainer.py"

MUTANTS = [
    # Memory.
    Mutant(
        "weights-aside-never-leave-memory",
        MEMORY,
        "            self._memory.madvise(mmap.MADV_DONTNEED)\n",
        "            pass\n",
        ASIDE,
    ),
    Mutant(
        "weights-aside-overlap",
        MEMORY,
        "zip(weights, starts[:-1], strict=True)",
        "zip(weights, starts[:1] * len(weights), strict=True)",
        ASIDE,
    ),
    # What is refused.
    Mutant(
        "nan-weights-are-trained-on",
        ENGINE,
        '    if accelerator.reduce(wrong, "sum").item() > 0:\n        raise InputError(\n'
        '            f"Weights are no longer',
        '    if accelerator.reduce(wrong, "sum").item() < 0:\n        raise InputError(\n'
        '            f"Weights are no longer',
        (f"{CHECKPOINTS}::test_weights_that_are_not_finite_are_never_saved",),
    ),
    Mutant(
        "a-run-may-start-from-its-own-checkpoints",
        RUN_FILES,
        "if any(fnmatch(first, name) for name in FILES):",
        "if first in FILES:",
        DIRECTORIES,
    ),
    Mutant(
        "a-run-goes-on-over-another-one",
        RUN_FILES,
        "and run.resolve() != directory.resolve()",
        "and run.resolve() == directory.resolve() != run",
        DIRECTORIES,
    ),
    Mutant(
        "processes-on-cpus-train-alone",
        ENGINE,
        "    state = PartialState(cpu=True)\n",
        "    state = PartialState()\n",
        PROCESSES,
    ),
    # Parts of a step.
    Mutant(
        "a-part-is-one-row-too-large",
        MICRO_BATCHES,
        "if parts and size([*parts[-1], row]) <= budget:",
        "if parts and size(parts[-1]) <= budget:",
        BUDGET,
    ),
    Mutant(
        "shortest-part-is-halved",
        MICRO_BATCHES,
        "longest = max(range(len(parts))",
        "longest = min(range(len(parts))",
        BUDGET,
    ),
    Mutant(
        "target-kl-never-stops",
        LEARNER,
        '["approx_kl"] > self.args.target_kl',
        '["approx_kl"] < -self.args.target_kl',
        OPTIONS,
    ),
    # Stop strings and kept sets.
    Mutant(
        "a-stop-string-ends-one-token-late",
        STOP_STRINGS,
        "(places >= self.lengths[:, None])",
        "(places > self.lengths[:, None])",
        STRINGS,
    ),
    Mutant(
        "a-stop-string-leaves-an-episode-unfinished",
        STOP_STRINGS,
        "finished | stopped",
        "finished",
        STRINGS,
    ),
    Mutant(
        "sets-of-the-first-episodes",
        "fastpg/trainer/rollouts/kept_sets.py",
        "shift = (begins[order] - new_begins)",
        "shift = (begins[: len(order)] - new_begins)",
        SETS,
    ),
    # Rewards.
    Mutant(
        "none-of-a-reward-is-0",
        "fastpg/trainer/rewards/functions.py",
        "known = [math.nan if number is None",
        "known = [0.0 if number is None",
        REWARDS,
    ),
    # Signals, and what is saved.
    Mutant(
        "a-signal-is-handled-though-ignored",
        SIGNALS,
        "not in (signal.SIG_IGN, None)",
        "is not None",
        SIGNALLED,
    ),
    Mutant(
        "a-signal-interrupts-an-update",
        SIGNALS,
        "        if self._at_once or insists:",
        "        if self.immediate or insists:",
        SIGNALLED,
    ),
    Mutant(
        "newest-checkpoint-named-before-it-is-there",
        "fastpg/trainer/run/checkpoint.py",
        '        save_model(temporary / "model")\n',
        "        write_text(run / LATEST, directory.name)\n"
        '        save_model(temporary / "model")\n',
        (f"{CHECKPOINTS}::test_a_checkpoint_is_named_as_the_newest_once_it_is_on_the_disk",),
    ),
    Mutant(
        "a-callback-of-a-save-costs-the-model",
        SAVER,
        "            with self.saving_if_stopped(step):\n",
        "            if step >= 0:\n",
        (f"{INTERRUPTIONS}::test_a_callback_that_raises_loses_no_finished_step", *OWN_LOOPS),
    ),
    Mutant(
        "a-dataset-that-raises-costs-steps",
        TRAINER,
        "                with saver.saving_if_stopped(step - 1), stop.at_once():\n"
        "                    rollout, episodes = self.roll_out(next(batches))\n",
        "                examples = next(batches)\n"
        "                with saver.saving_if_stopped(step - 1), stop.at_once():\n"
        "                    rollout, episodes = self.roll_out(examples)\n",
        (f"{INTERRUPTIONS}::test_a_dataset_that_raises_loses_no_finished_step",),
    ),
    Mutant(
        "a-run-follows-the-working-directory",
        TRAINER,
        "self.directory = Path(self.args.output_dir).absolute()",
        "self.directory = Path(self.args.output_dir)",
        DIRECTORIES,
    ),
    Mutant(
        "a-loop-that-is-taken-up-cannot-be-finished",
        OWN_LOOP,
        "if self._saver is None and self._resumed is None:",
        "if self._saver is None:",
        OWN_LOOPS,
    ),
]
