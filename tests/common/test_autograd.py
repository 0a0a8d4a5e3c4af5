"""What every op promises of transforms: its gradient is taken once, and torch.vmap raises."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpg
from bench.inputs import logits_and_labels

X, Y = torch.randn(2, 3, 5).unbind()
MASK, WEIGHT = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 5)
HEAD, LABELS = logits_and_labels(7, 5)
OPS = {
    "token_logprobs": lambda x: fastpg.token_logprobs(x, LABELS[:3]),
    "linear_token_logprobs": lambda x: fastpg.linear_token_logprobs(x, HEAD, LABELS[:3]),
    "linear_token_loss": lambda x: fastpg.linear_token_loss(
        x, HEAD, LABELS[:3], lambda logp, *_: (logp.sum(), None)
    )[0],
    "kl_estimate": lambda x: fastpg.kl_estimate(x, Y, kind="k3"),
    "token_rewards": lambda x: fastpg.token_rewards(x[:, 0], MASK),
    "whiten": lambda x: fastpg.whiten(x, MASK),
    "gae": lambda x: fastpg.gae(x, Y)[0],
    "value_loss": lambda x: fastpg.value_loss(x, Y, WEIGHT)[0],
    "policy_loss": lambda x: fastpg.policy_loss(x, Y, WEIGHT, old_logp=Y)[0],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_can_be_read_but_a_penalty_on_it_raises(op, checkpointed):
    x = X.clone().requires_grad_()
    out = checkpoint(OPS[op], x, use_reentrant=False) if checkpointed else OPS[op](x)
    loss = out.sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert not plain.requires_grad and torch.equal(plain, grad)
    with pytest.raises(RuntimeError, match=f"{op}: its gradient is not differentiable, double"):
        (loss + grad.square().sum()).backward()


WITHOUT_GRADIENT = {
    "importance_weights": lambda x: fastpg.importance_weights(x, Y, MASK)[0],
    "token_weights": lambda x: fastpg.token_weights(x),
}


@pytest.mark.parametrize("op", OPS | WITHOUT_GRADIENT)
def test_vmap_raises(op):
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap((OPS | WITHOUT_GRADIENT)[op])(X.expand(2, 3, 5))
