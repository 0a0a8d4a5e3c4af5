"""Two processes that sample, score and learn for real, as a plain loop on all their episodes."""

import pytest
import torch
from plain_loop import learn_plainly, plain_loop
from recorded_runs import moved_trainer, recording, trained_parameters
from tiny_trainer import make_trainer, metrics_of
from two_processes import ENGINES, in_two_processes

from fastpg.tasks import reviews

pytestmark = pytest.mark.slow

ALGORITHMS = ["ppo", "grpo", "dr_grpo"]
ONE = [{"prompt": "the story was"}]
NUMBERED = [{"prompt": text, "number": i} for i, text in enumerate(reviews.subjects()[:7])]


def played(folder, algorithm):
    """A run of this process: its rounds, and the parameters that it ends with."""
    trainer, _ = moved_trainer(f"{folder}/{algorithm}", algorithm)
    with recording(trainer) as rounds:
        trainer.train()
    return rounds, trained_parameters(trainer)


def sampled(folder):
    """The completions of this process where all processes have the same prompt at all times."""
    trainer = make_trainer(f"{folder}/one", dataset=ONE * 20, num_eval_samples=10)
    with recording(trainer) as rounds:
        trainer.train()
    return [r.sequences.tolist() for r in rounds]


def evaluated(folder, count):
    """The metrics of an evaluation, and the numbers of the rows that this process has scored."""
    numbers = []

    def reward(completions, number):
        numbers.extend(number)
        return [float(i**2) for i in number]

    trainer = make_trainer(f"{folder}/e", reward, dataset=NUMBERED, num_eval_samples=count)
    return trainer.evaluate(), numbers


def all_runs(folder):
    results = {name: played(folder, name) for name in ALGORITHMS}
    results["one prompt"] = sampled(folder)
    results["evaluations"] = [evaluated(folder, count) for count in (7, 1)]
    return results


# The tests of an engine are one worker's, so that its runs are made once.
GROUPS = [pytest.param(engine, marks=pytest.mark.xdist_group(engine)) for engine in ENGINES]


@pytest.fixture(scope="module", params=GROUPS)
def ranks(tmp_path_factory, request):
    """The folder of the runs, and the results of both processes."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, in_two_processes(all_runs, folder, engine=request.param)


class Together:
    """The rounds of two processes as one: the episodes of the second are numbered after."""

    def __init__(self, first, second):
        self.parts = first, second

    def episodes(self, ends):
        return [episode for part in self.parts for episode in part.episodes(ends)]

    def minibatches(self):
        first, second = (part.minibatches() for part in self.parts)
        shift = len(self.parts[0].sequences)
        return [a + [shift + i for i in b] for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_learn_as_a_plain_loop_on_all_episodes(ranks, tmp_path, algorithm):
    """The parameters of both, and every metric of every step."""
    folder, results = ranks
    (first, parameters), (second, other_parameters) = (rank[algorithm] for rank in results)
    assert torch.equal(parameters, other_parameters)
    rounds = [Together(*pair) for pair in zip(first[1:-1], second[1:-1], strict=True)]
    loop = plain_loop(*moved_trainer(tmp_path, algorithm))
    expected = learn_plainly(loop, rounds)
    torch.testing.assert_close(parameters.double(), loop.parameters(), rtol=0, atol=3e-6)
    logged = metrics_of(folder / algorithm)
    for row, by_hand in zip(logged, expected, strict=True):
        assert {name: row[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
        tokens = row["tokens_per_second"] * row["time/step"]
        assert tokens == pytest.approx(by_hand["policy/count"] / 2)  # There are two passes.
        assert abs(row["objective/kl"]) > 1e-2


@pytest.mark.parametrize("algorithm, generations", [("ppo", 1), ("grpo", 4)])
def test_processes_have_prompts_of_their_own(ranks, algorithm, generations):
    """No row of the dataset comes twice before every row has come once."""
    first, second = (rank[algorithm][0] for rank in ranks[1])
    prompts = [
        tuple(ids[kept.bool()].tolist())
        for pair in zip(first[1:-1], second[1:-1], strict=True)
        for part in pair
        for ids, kept in zip(part.input_ids[::generations], part.attention_mask[::generations],
                             strict=True)
    ]  # fmt: skip
    assert len(prompts) == 48 // generations
    for start in range(0, len(prompts) - 7, 8):
        assert len(set(prompts[start : start + 8])) == 8


def test_processes_draw_samples_of_their_own(ranks):
    """In training and in evaluation, though all of them have the same prompts."""
    mine, others = (rank["one prompt"] for rank in ranks[1])
    assert [len(sequences) for sequences in mine] == [5, 10, 10, 5]
    for sequences, other_sequences in zip(mine, others, strict=True):
        assert sequences != other_sequences
        assert not set(map(tuple, sequences)) & set(map(tuple, other_sequences))


def test_processes_share_an_evaluation_out(ranks):
    """Every row is scored once, and all processes report all of them."""
    mine, others = (rank["evaluations"] for rank in ranks[1])
    for count, (metrics, numbers), (other_metrics, other_numbers) in zip(
        (7, 1), mine, others, strict=True
    ):
        assert numbers + other_numbers == list(range(count))
        assert metrics == other_metrics
        squares = [i**2 for i in range(count)]
        assert metrics["eval/reward/mean"] == pytest.approx(sum(squares) / count)
    assert [len(numbers) for _, numbers in mine] == [4, 1]
