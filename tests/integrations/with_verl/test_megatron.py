"""Shards of the vocabulary, as verl's engine for Megatron has them: two ranks, each with a half."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

VOCAB, HIDDEN, TOKENS = 60, 16, 11


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (1, TOKENS), generator=generator)
    upstream = torch.randn(2, TOKENS, generator=generator)
    return hidden, weight, labels, upstream


def half(x, dim=-1):
    return x.chunk(2, dim)[dist.get_rank()]


def of_logits(functions, logits, labels, upstream):
    """Log-probs, entropies, and the gradient of this rank's half of the logits."""
    leaf = half(logits).clone().requires_grad_()
    logp = functions.vocab_parallel_log_probs_from_logits(leaf * 1, labels)
    entropy = functions.vocab_parallel_entropy(leaf * 1)
    chunked = functions.vocab_parallel_entropy_with_chunking(leaf.detach() * 1, chunk_size=4)
    total = (logp * upstream[0]).sum() + (entropy * upstream[1]).sum()
    return logp, entropy, chunked, *torch.autograd.grad(total, leaf)


def compare(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    from stubs import stub

    stub("ray")
    import verl.utils.kernel.linear_cross_entropy as kernel
    import verl.utils.megatron.tensor_parallel as stock
    from megatron.core import parallel_state

    from fastpg.integrations import verl as ours

    parallel_state.initialize_model_parallel(2)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden, weight, labels, upstream = inputs()
    logits = hidden.transpose(0, 1) @ weight.T
    torch.compiler.set_stance("force_eager")
    oracle = of_logits(stock, logits.double(), labels, upstream.double())
    with ours.patched(["logprob", "entropy", "linear"], strict=True):
        mine = of_logits(stock, logits, labels, upstream)
        for result, expected in zip(mine, oracle, strict=True):
            torch.testing.assert_close(result.double(), expected.double(), rtol=1e-5, atol=1e-5)
        # Of the fused head the ranks' gradients of hidden are parts, which Megatron sums.
        leaves = [x.clone().requires_grad_() for x in (hidden, half(weight, 0))]
        results = kernel.linear_cross_entropy(*leaves, labels, 0.7, "none", group)
    results[0].backward(upstream[0], retain_graph=True)
    results[1].backward(upstream[1])
    whole = [x.double().requires_grad_() for x in (hidden, weight)]
    logp = (whole[0][:, 0] @ whole[1].T / 0.7).log_softmax(-1)
    exact = logp.gather(-1, labels.T)[:, 0], -(logp.exp() * logp).sum(-1)
    torch.autograd.backward(exact, tuple(upstream.double()))
    dist.all_reduce(leaves[0].grad)
    gradients = whole[0].grad, half(whole[1].grad, 0)
    for result, expected in zip(results, exact, strict=True):
        torch.testing.assert_close(result.flatten().double(), expected, rtol=1e-5, atol=1e-5)
    for leaf, expected in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()


def test_both_ranks_get_what_verl_gives_them(tmp_path):
    mp.spawn(compare, (tmp_path / "rendezvous",), nprocs=2)
