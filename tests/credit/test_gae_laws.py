"""The laws of advantages, for gae."""

import math

import pytest
import torch
from accuracy import leaves
from gae_inputs import (
    CU,
    POISON,
    by_loop,
    flags,
    inputs,
    record,
    scaled_to_blocks,
    sequences,
    shorten_blocks,
)

from fastpg import gae
from fastpg.ops.credit import gae as page

OP = "gae"


@pytest.fixture(autouse=True)
def short_blocks(request, monkeypatch):
    shorten_blocks(request, monkeypatch)


def test_any_strides(kernel):
    rewards, values, mask = inputs((5, 8))
    views = rewards.t()[1:], values[:, :1].expand(5, 8).t()[1:], mask.t()[1:]
    gamma = torch.tensor([0.9], dtype=torch.float64).expand(7)
    ours = gae(*views, gamma=gamma, lam=torch.tensor(0.8))
    expected = gae(*(x.clone() for x in views), gamma=0.9, lam=torch.full((7, 5), 0.8))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_as_many_tokens_as_sequences_is_per_token(kernel):
    cu, gamma = torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([0.25, 0.5])
    assert gae(torch.ones(2), gamma=gamma, cu_seqlens=cu)[0].tolist() == [1.25, 1.0]
    after = gae(torch.ones(2), gamma=gamma, bootstrap=torch.tensor([8.0, 4.0]), cu_seqlens=cu)[0]
    assert after.tolist() == [1.75, 3.0]


def test_published_vectors(kernel):
    """rlax, truncated_generalized_advantage_estimation; a discount of 0 ends an episode."""
    rewards = torch.tensor([[0, 0, 1, 0, -0.5], [0, 0, 0, 0, 1]])
    values = torch.tensor([[1.0, 4, -3, -2, -1], [-3, -2, -1, 0, 5]])
    discounts = torch.tensor([[0.99, 0.99, 0.99, 0.99, 0.99], [0.9, 0.9, 0.9, 0, 0.9]])
    for lam, *expected in (
        (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0, -4.9]),
        (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0, -4.9]),
        (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1.0, 0.0, -4.9]),
    ):
        after = torch.tensor([-1.0, -1.0])
        ours, _ = gae(rewards, values, gamma=discounts, lam=lam, bootstrap=after)
        torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-3)


def test_published_vtrace(kernel):
    """rlax, vtrace_td_error_and_advantage: log-ratios from logits, clipped at 1."""
    behavior = [[[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]],
                [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]]]  # fmt: skip
    target = [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]],
              [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]  # fmt: skip
    actions = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]])
    logps = [torch.tensor(x).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
             for x in (target, behavior)]  # fmt: skip
    ratio = (logps[0] - logps[1]).exp().clamp(max=1)
    rewards = torch.tensor([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]])
    values = torch.tensor([[2.1, 1.1, -3.1, 0.0], [3.1, 0.1, -1.1, 7.4]])
    discounts = torch.tensor([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]])
    after = torch.tensor([8.4, -1.2])
    errors, targets = gae(rewards, values, gamma=discounts, bootstrap=after, rho=ratio, c=ratio)
    expected = torch.tensor([[-1.6155143, -3.4973226, 1.8670533, 50.316002],
                             [1.4662437, 3.6116405, -8.3327293e-5, -13.54]])  # fmt: skip
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(targets, values + expected, rtol=1e-3, atol=1e-7)


def test_on_policy_vtrace_is_the_lambda_return(kernel):
    rewards, values, mask = inputs()
    one = torch.ones_like(rewards)
    ours = gae(rewards, values, mask, gamma=0.9, lam=0.8, rho=one, c=one)
    plain = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_ratio_of_zero_leaves_the_value(kernel):
    rewards, values, _ = inputs()
    rho = torch.zeros_like(rewards)
    advantages, returns = gae(rewards, values, gamma=0.9, rho=rho, c=rho)
    assert advantages.count_nonzero() == 0 and torch.equal(returns, values)


def test_lambda_one_is_monte_carlo(kernel):
    rewards, values, _ = inputs()
    advantages, returns = gae(rewards, values, gamma=0.9)
    discount = 0.9 ** torch.arange(7, dtype=torch.float64)
    for t in range(7):
        expected = (rewards[:, t:] * discount[: 7 - t]).sum(1)
        torch.testing.assert_close(returns[:, t], expected)
        torch.testing.assert_close(advantages[:, t], expected - values[:, t])
    to_go = gae(rewards, gamma=0.9)
    assert torch.equal(*to_go)
    torch.testing.assert_close(to_go[0], returns)


def test_lambda_zero_is_the_td_error(kernel):
    rewards, values, _ = inputs()
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    advantages, _ = gae(rewards, values, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, rewards + 0.9 * after - values)


def test_deleting_masked_tokens_equals_masking_them(kernel):
    rewards, values, mask = inputs((1, 40), torch.float32)
    masked = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    deleted = gae(rewards[mask][None], values[mask][None], gamma=0.99, lam=0.95)
    for a, b in zip(masked, deleted, strict=True):
        assert torch.equal(a[mask], b[0]) and a[~mask].count_nonzero() == 0


@pytest.mark.parametrize("poison", POISON)
def test_masked_slots_change_no_bit(kernel, poison):
    rewards, values, mask = inputs()
    terminated, truncated, bootstrap = flags(mask.shape)
    gamma = torch.full(mask.shape, 0.9, dtype=torch.float64)
    weight = torch.randn(mask.shape, dtype=torch.float64)

    def run(fill):
        tensors = leaves(*(torch.where(mask, x, fill) for x in (rewards, values)))
        tensors += leaves(torch.where(mask & truncated & ~terminated, bootstrap, fill))
        ratio = torch.where(mask, gamma, fill)
        out = gae(*tensors[:2], mask, gamma=ratio, lam=0.8, rho=ratio, c=ratio,
                  terminated=terminated, truncated=truncated, bootstrap=tensors[2])  # fmt: skip
        torch.autograd.backward(out, [torch.where(mask, weight, fill)] * 2)
        return [*out, *(x.grad for x in tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(0.0), run(poison), strict=True))


def test_packed_equals_padded_equals_one_by_one(kernel):
    rewards, values, mask = inputs((20,), torch.float32)
    packed = gae(rewards, values, mask, gamma=0.9, lam=0.8, cu_seqlens=CU)
    padded = [torch.nn.utils.rnn.pad_sequence(sequences(x, CU), batch_first=True)
              for x in (rewards, values, mask)]  # fmt: skip
    padded = gae(*padded, gamma=0.9, lam=0.8)
    split = zip(*(sequences(x, CU) for x in (rewards, values, mask)), strict=True)
    single = [gae(*(x[None] for x in one), gamma=0.9, lam=0.8) for one in split]
    for k in range(2):
        for i, ours in enumerate(sequences(packed[k], CU)):
            assert torch.equal(ours, padded[k][i, : len(ours)])
            assert torch.equal(ours, single[i][k][0])


@pytest.mark.parametrize("masked", [False, True])
def test_batch_mates_and_threads_never_matter(kernel, masked):
    shape = (7, {"reference": 60, "triton": 20}.get(kernel, 9000))
    rewards, values, mask = inputs(shape, torch.float32)

    def run(rows):
        tensors = leaves(rewards[rows], values[rows])
        out = gae(*tensors, mask[rows] if masked else None, gamma=0.99, lam=0.95)
        torch.autograd.backward(out, [values[rows], rewards[rows]])
        return [*out, *(x.grad for x in tensors)]

    threads, every = torch.get_num_threads(), run(slice(None))
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(slice(None)), every, strict=True))
    finally:
        torch.set_num_threads(threads)
    for row in range(7):
        alone = run(slice(row, row + 1))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, every, strict=True))


def test_a_long_sequence_among_short_ones_keeps_its_bits(kernel):
    short = 10 if kernel == "triton" else 100  # its interpreter is slow
    lengths = torch.tensor([0, 700] + [1] * short)
    cu = lengths.cumsum(0).to(torch.int32)
    rewards, values, mask = inputs((700 + short,))

    def run(tokens, cu_seqlens=None):
        tensors = leaves(rewards[tokens], values[tokens])
        out = gae(*tensors, mask[tokens], gamma=0.99, lam=0.95, cu_seqlens=cu_seqlens)
        torch.autograd.backward(out, [values[tokens], rewards[tokens]])
        return [*out, *(x.grad for x in tensors)]

    packed, alone = run(slice(None), cu), run((None, slice(700)))
    assert all(torch.equal(a[:700], b[0]) for a, b in zip(packed, alone, strict=True))


def test_truncation_is_an_absorbing_constant(kernel):
    """A bootstrap V after the end equals tokens of value V and reward (1 - gamma) V without end."""
    rewards, values, _ = inputs()
    after = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    flag = torch.ones(3, dtype=torch.bool)
    cut = gae(rewards, values, gamma=0.9, lam=0.8, truncated=flag, bootstrap=after)
    forever = after[:, None].expand(3, 5)
    longer = gae(torch.cat([rewards, 0.1 * forever], 1), torch.cat([values, forever], 1),
                 gamma=0.9, lam=0.8, bootstrap=after)  # fmt: skip
    for a, b in zip(cut, longer, strict=True):
        torch.testing.assert_close(a, b[:, :7])


def test_a_token_that_is_terminated_and_truncated_has_no_bootstrap(kernel):
    rewards, values, _ = inputs((2, 5))
    both = torch.ones(2, 5, dtype=torch.bool)
    bootstrap = torch.full((2, 5), 3.0, dtype=torch.float64, requires_grad=True)
    out = gae(rewards, values, gamma=0.9, terminated=both, truncated=both, bootstrap=bootstrap)
    torch.testing.assert_close(out, (rewards - values, rewards), rtol=1e-12, atol=1e-12)
    (out[0] + out[1]).sum().backward()
    assert (bootstrap.grad == 0).all()


@pytest.mark.parametrize("name", ["gamma", "lam", "c"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_trace_of_zero_lets_no_infinite_reward_through(kernel, name, with_mask):
    """0 times infinity is NaN; the formula has no such product where the trace is cut."""
    length = scaled_to_blocks(1300, kernel)
    rewards, values, mask = inputs((2, length))
    rewards[0, length // 2], rewards[1, 3] = torch.inf, -torch.inf
    mask |= rewards.isinf()
    options = {"gamma": 0.9, "lam": 0.9, name: 0.0}
    if name == "c":
        options["c"] = torch.zeros_like(rewards)
    ours = gae(rewards, values, mask if with_mask else None, **options)
    finite = rewards.isfinite()
    plain = gae(rewards.where(finite, 0.0), values, mask if with_mask else None, **options)
    for got, want in zip(ours, plain, strict=True):
        assert torch.equal(got[finite], want[finite]) and torch.equal(
            got[~finite], rewards[~finite]
        )


def test_a_nan_stays_in_its_episode(kernel):
    rewards, values, _ = inputs((1, 300))
    terminated, truncated = torch.zeros(2, 1, 300, dtype=torch.bool)
    terminated[0, [2, 200]] = truncated[0, 99] = True
    ends = {"terminated": terminated, "truncated": truncated, "bootstrap": values + 1}
    rewards[0, 202] = math.nan
    rewards.requires_grad_()
    advantages, _ = gae(rewards, values, gamma=0.9, lam=0.8, **ends)
    assert advantages.isnan().nonzero()[:, 1].tolist() == [201, 202]
    upstream = torch.ones_like(values)
    upstream[0, 97] = math.nan
    advantages.backward(upstream)
    assert rewards.grad.isnan().nonzero()[:, 1].tolist() == [97, 98, 99]


def test_a_nan_stays_in_its_sequence(kernel):
    """An empty sequence lies between its neighbours, of which one has a ratio of NaN at its end."""
    rewards, values, _ = inputs((5,))
    cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    ratio = torch.ones_like(rewards)
    ratio[2] = math.nan
    bootstrap = torch.ones(3, dtype=torch.float64, requires_grad=True)
    advantages, _ = gae(rewards, values, rho=ratio, bootstrap=bootstrap, cu_seqlens=cu)
    advantages.sum().backward()
    assert advantages.isnan().tolist() == [True, True, True, False, False]
    assert bootstrap.grad.isnan().tolist() == [True, False, False] and bootstrap.grad[1] == 0


def test_long_sums_keep_their_digits(kernel):
    # The interpreter of Triton is slow, and the reference a loop in Python.
    length = {"triton": 701, "reference": 7001}.get(kernel, 70001)
    rewards = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    exact = rewards.double().cpu().flip(1).cumsum(1).flip(1)
    assert ((gae(rewards)[1].cpu() - exact).abs() <= 1e-5 * exact).all()


@pytest.mark.parametrize("length", [128, 500, 1000, 1023, 1024, 1025, 1400])
def test_gradient_of_a_bootstrap_at_any_length(kernel, length):
    """In CUDA C++ a warp has tiles of 128 tokens, and up to 8 warps a block: some lack tokens."""
    length = scaled_to_blocks(length, kernel)
    rewards = torch.zeros(1, length, dtype=torch.float64)
    bootstrap = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    advantages, returns = gae(rewards, gamma=0.99, lam=0.95, bootstrap=bootstrap)
    weight = torch.randn(2, 1, length, dtype=torch.float64)
    torch.autograd.backward((advantages, returns), (weight[0], weight[1]))
    decay = 0.99 * (0.99 * 0.95) ** torch.arange(length - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(bootstrap.grad, (weight.sum(0) * decay).sum(1))


@pytest.mark.parametrize("length", [127, 128, 129, 1023, 1024, 1025, 1153])
def test_edges_of_tiles(kernel, length):
    """The values and gradients of lengths at which tiles, warps and blocks of them end."""
    length = scaled_to_blocks(length, kernel)
    rewards, values, _ = inputs((2, length), seed=length)
    rewards, values = leaves(rewards, values)
    bootstrap = torch.tensor([0.5, -2.0], dtype=torch.float64)
    advantages, returns = gae(rewards, values, bootstrap=bootstrap, gamma=0.9, lam=0.8)
    # The value that follows the last token counts like a reward of gamma times it there.
    ended = rewards.detach().clone()
    ended[:, -1] += 0.9 * bootstrap
    expected = by_loop(ended, values, None, 0.9, 0.8)
    torch.testing.assert_close(torch.stack([advantages, returns]), expected)
    weight = torch.randn(2, length, dtype=torch.float64)
    grads = torch.autograd.grad(advantages, (rewards, values), weight)
    sent = weight.clone()  # G_t = w_t + gamma lam G_{t-1}
    for t in range(1, length):
        sent[:, t] += 0.9 * 0.8 * sent[:, t - 1]
    torch.testing.assert_close(grads[0], sent)
    before = torch.nn.functional.pad(sent, (1, 0))[:, :length]
    torch.testing.assert_close(grads[1], 0.9 * before - sent)


LENGTHS = [5, 0, 128, 129, 1, 300, 700, 1024, 1025, 2, 6000, 130]


@pytest.mark.parametrize("options", ["none", "mask", "all"])
def test_how_long_sequences_are_shared_out_changes_no_bit(kernel, options, monkeypatch):
    """In CUDA C++ blocks share a long sequence, and short ones share a block."""
    if kernel not in ("cuda", "cuda-on-cpu"):
        pytest.skip("for the launches in CUDA C++")
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    count = int(cu[-1])
    rewards, values, mask = inputs((count,), torch.float32)
    long = LENGTHS.index(6000)
    mask[int(cu[long]) + 900 : int(cu[long]) + 3300] = False  # some groups are masked wholly
    ends = torch.rand(2, count, generator=torch.Generator().manual_seed(0)) < 0.002
    given = {"cu_seqlens": cu, "gamma": 0.99, "lam": 0.95, "mask": mask}
    if options == "none":
        del given["mask"]
    if options == "all":
        given |= {"terminated": ends[0], "truncated": ends[1], "bootstrap": values + 1}

    def run():
        tensors = leaves(rewards, values)
        out = gae(*tensors, **given)
        torch.autograd.backward(out, [values, rewards])
        return [*out, *(x.grad for x in tensors)]

    shared, again = run(), run()  # where blocks run in another order
    monkeypatch.setattr(page, "GROUP_TOKENS", 1 << 40)  # so no sequence is long
    alone = run()
    assert all(torch.equal(a, b) for a, b in zip(shared, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
    expected = page.reference(record(rewards, values, **given))
    torch.testing.assert_close(tuple(shared[:2]), tuple(expected), rtol=1e-5, atol=1e-5)


def test_the_message_of_a_long_masked_end(kernel):
    """The value that follows a group is far before it in the scan, or a bootstrap."""
    if kernel not in ("cuda", "cuda-on-cpu"):
        pytest.skip("for the launches in CUDA C++")
    rewards, values, _ = inputs((2, 6000))
    mask = torch.ones(2, 6000, dtype=torch.bool)
    mask[0, 2500:] = mask[1, 100:5000] = False
    bootstrap = torch.tensor([2.0, -3.0], dtype=torch.float64)
    tensors = leaves(rewards, values, bootstrap)
    out = gae(*tensors[:2], mask, gamma=0.99, lam=0.95, bootstrap=tensors[2])
    x = record(rewards, values, bootstrap=bootstrap, mask=mask, gamma=0.99, lam=0.95)
    torch.testing.assert_close(tuple(out), tuple(page.reference(x)))
    torch.autograd.backward(out, [values, rewards])
    expected = page.reference_backward(page.BackwardInputs(x, values, rewards))
    torch.testing.assert_close(tuple(t.grad for t in tensors), tuple(expected))
