"""The recipes of docs/plain_loops.md train as a plain loop with log_softmax does.

Those for several processes run on two, each with half of the rows. with_lightning has Lightning's.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_loops import (
    PAGE,
    RATE,
    RECIPES,
    assert_recipe_trains_as_a_plain_loop,
    assert_trained,
    batch_of,
    begin,
    ppo_loss,
    run,
    trained_plainly,
)
from torch.distributed.tensor import DTensor

import fastpg

OTHERS = ["Lightning", "LoRA by peft", "Distillation from a teacher's top K"]
ALONE = ["Hugging Face Trainer", "Accelerate"]
SHARDED = "A sharded vocabulary"
TOGETHER = [
    "DDP",
    "FSDP2, the head in the root's group",
    "FSDP2, the head in a group of its own",
    SHARDED,
]


@pytest.fixture(autouse=True)
def anywhere(tmp_path, monkeypatch):
    """Some recipes write into the working directory; some kernels of the model are not exact."""
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)


def test_every_recipe_of_the_page_is_tested():
    assert set(RECIPES) == {*ALONE, *OTHERS, *TOGETHER}
    assert "**The head must be inside the `forward` that DDP wraps." in PAGE.read_text()


@pytest.mark.parametrize("recipe", ALONE)
def test_a_recipe_trains_as_a_plain_loop(recipe):
    assert_recipe_trains_as_a_plain_loop(recipe)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_on_the_head_is_trained():
    names, _ = run("LoRA by peft")
    model = names["policy"].lm
    found = {name: x.detach().clone() for name, x in model.named_parameters()}
    with torch.no_grad():
        for x in names["trained"]:
            x += RATE * x.grad  # as before the step
            x.grad = None
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    expected = trained_plainly(model, ppo_loss(model, names["rows"]))
    assert_trained(found, expected, before)
    assert any("lm_head.lora_B" in name for name in expected)


def test_a_student_learns_from_the_top_k_of_a_teacher():
    names, before = run("Distillation from a teacher's top K")
    batch = batch_of(names["rows"])
    logp = before(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    p = logp.gather(-1, batch["teacher_ids"]).exp()
    student, teacher = (
        torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, batch["teacher_logp"].exp())
    )
    divergence = (teacher * (teacher / student).log()).sum(-1)
    expected = trained_plainly(before, (batch["weight"] * divergence).sum())
    found = dict(names["lm"].named_parameters())
    assert_trained(found, expected, dict(before.named_parameters()))


def on_each_rank(rank, folder):
    """Runs every recipe for two processes; saves the trained weights, whole."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for recipe in TOGETHER:
        names, _ = run(recipe)
        results[recipe] = {
            name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
            for name, x in names["lm"].named_parameters()
        }
    results["outside"] = head_outside_of_ddp(rank)
    torch.save(results, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def head_outside_of_ddp(rank):
    """The gradients of a trunk that DDP wraps, and of a fused head that it does not."""
    torch.manual_seed(0)
    trunk, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False)
    model = torch.nn.parallel.DistributedDataParallel(trunk)
    hidden = model(torch.randn(6, 4) + rank)
    fastpg.linear_token_logprobs(hidden, head.weight, torch.arange(6)).sum().backward()
    return trunk.weight.grad, head.weight.grad


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes have trained."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.use_deterministic_algorithms(False)
    mp.start_processes(on_each_rank, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(f"{folder}/rank{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("recipe", TOGETHER)
def test_a_recipe_for_several_processes_trains_as_a_plain_loop(recipe, ranks):
    names = begin()
    before = names["lm"]
    expected = trained_plainly(before, ppo_loss(before, names["rows"]))
    both = [rank[recipe] for rank in ranks]
    if recipe == SHARDED:
        head = torch.cat([found["lm_head.weight"] for found in both])
        both = [found | {"lm_head.weight": head} for found in both]
    for found in both:
        assert_trained(found, expected, dict(before.named_parameters()))


def test_a_head_outside_of_what_ddp_wraps_gets_no_all_reduce(ranks):
    """The page says so in bold."""
    (trunk, head), (other_trunk, other_head) = (rank["outside"] for rank in ranks)
    assert torch.equal(trunk, other_trunk)
    assert (head - other_head).abs().max() > 0.1
