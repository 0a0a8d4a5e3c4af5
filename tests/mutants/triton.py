"""Faults of the kernels in Triton, which run in its interpreter where there is no GPU."""

from . import Mutant

SHARED = "fastpg/ops/common/triton.py"
GAE = "fastpg/ops/credit/gae_triton.py"
TOKEN_REWARDS = "fastpg/ops/credit/token_rewards_triton.py"
WHITEN = "fastpg/ops/credit/whiten_triton.py"
POLICY_LOSS = "fastpg/ops/loss/policy_loss_triton.py"
VALUE_LOSS = "fastpg/ops/loss/value_loss_triton.py"
LOGPROBS = "fastpg/ops/vocabulary/token_logprobs_triton.py"
IMPORTANCE = "fastpg/ops/weight/importance_weights_triton.py"

IN_TRITON = ("-k", "triton")
GAE_TESTS = ("tests/credit/test_gae_laws.py", "tests/credit/test_gae.py", *IN_TRITON)
LOGPROBS_TESTS = (
    "tests/vocabulary/test_token_logprobs_edges.py",
    "tests/vocabulary/test_token_logprobs.py",
    *IN_TRITON,
)
IMPORTANCE_BLOCKS = (
    "tests/weight/test_importance_weights.py::test_every_block_is_merged",
    *IN_TRITON,
)
POLICY_BLOCKS = ("tests/loss/test_policy_loss_laws.py::test_every_block_is_merged", *IN_TRITON)
POLICY_TESTS = (
    "tests/loss/test_policy_loss_laws.py",
    "tests/loss/test_policy_loss_bounds.py",
    "tests/loss/test_policy_loss.py",
    *IN_TRITON,
)

MUTANTS = [
    Mutant(
        "moments-of-the-first-round-only",
        SHARED,
        "    for start in range(0, rows, CHUNK):\n        n_i = column",
        "    for start in range(0, CHUNK, CHUNK):\n        n_i = column",
        ("tests/credit/test_whiten.py::test_every_block_is_merged", *IN_TRITON),
    ),
    Mutant(
        "squares-of-the-first-round-only",
        SHARED,
        "    for start in range(0, rows, CHUNK):\n        d = column",
        "    for start in range(0, CHUNK, CHUNK):\n        d = column",
        ("tests/credit/test_whiten.py::test_every_block_is_merged", *IN_TRITON),
    ),
    Mutant(
        "a-packed-sequence-ends-one-token-late",
        SHARED,
        "end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), tokens)",
        "end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64) + 1, tokens)",
        ("tests/credit/test_token_rewards.py::test_packed_equals_padded", *IN_TRITON),
    ),
    Mutant(
        "the-value-before-a-block-is-that-of-a-masked-token",
        GAE,
        "next_value = pick(value_from, token, start)",
        "next_value = pick(value, token, start)",
        GAE_TESTS,
    ),
    Mutant(
        "the-carry-of-a-partial-block-is-taken-beyond-its-end",
        GAE,
        "last = tl.minimum(start + BLOCK, end) - 1",
        "last = start + BLOCK - 1",
        GAE_TESTS,
    ),
    Mutant(
        "the-advantage-is-not-carried-between-blocks",
        GAE,
        "        next_advantage = pick(advantage, token, start)\n",
        "",
        GAE_TESTS,
    ),
    Mutant(
        "a-cut-lets-nan-through",
        GAE,
        "tl.where(a_then == 0, b_then, b_then + a_then * b)",
        "b_then + a_then * b",
        GAE_TESTS,
    ),
    Mutant(
        "the-last-token-is-sought-in-the-last-block",
        TOKEN_REWARDS,
        "tl.where(load_mask(mask, token, token < end), token, last)",
        "tl.where(load_mask(mask, token, token < end), token, -1)",
        (
            "tests/credit/test_token_rewards.py::test_the_last_token_may_be_in_any_block",
            *IN_TRITON,
        ),
    ),
    Mutant(
        "the-gradient-has-the-sums-of-the-first-block",
        WHITEN,
        "sums=parts.sum(0)",
        "sums=parts[0]",
        ("tests/credit/test_whiten.py", *IN_TRITON),
    ),
    Mutant(
        "policy-statistics-of-the-first-round-only",
        POLICY_LOSS,
        "    for start in range(0, rows, ROWS):\n",
        "    for start in range(0, ROWS, ROWS):\n",
        POLICY_BLOCKS,
    ),
    Mutant(
        "the-least-ratio-is-that-of-the-last-round",
        POLICY_LOSS,
        "least = tl.minimum(least, tl.where(row < rows, x, INFINITY))",
        "least = tl.where(row < rows, x, INFINITY)",
        POLICY_BLOCKS,
    ),
    Mutant(
        "a-sequence-of-its-last-block",
        POLICY_LOSS,
        "        total += tl.where(tl.abs(d) == INFINITY",
        "        total = tl.where(tl.abs(d) == INFINITY",
        POLICY_TESTS,
    ),
    Mutant(
        "value-sums-of-the-first-round-only",
        VALUE_LOSS,
        "    for start in range(0, rows, CHUNK):\n",
        "    for start in range(0, CHUNK, CHUNK):\n",
        ("tests/loss/test_value_loss.py::test_every_block_is_merged", *IN_TRITON),
    ),
    Mutant(
        "importance-sums-of-the-last-round-only",
        IMPORTANCE,
        "            total += column(parts, field, start, programs, FIELDS)",
        "            total = column(parts, field, start, programs, FIELDS)",
        IMPORTANCE_BLOCKS,
    ),
    Mutant(
        "the-greatest-importance-is-that-of-the-last-round",
        IMPORTANCE,
        "most = tl.maximum(most, tl.where(inside, highest, -INFINITY))",
        "most = tl.where(inside, highest, -INFINITY)",
        IMPORTANCE_BLOCKS,
    ),
    Mutant(
        "ignored-rows-are-read",
        LOGPROBS,
        "length = tl.where(kept, vocab, 0)",
        "length = tl.where(kept, vocab, vocab)",
        LOGPROBS_TESTS,
        harmless="the results of an ignored row are 0 whatever is read: it takes time alone",
    ),
    Mutant(
        "rows-that-the-entropy-alone-reaches-get-nothing",
        LOGPROBS,
        "reached = reached | (g_entropy != 0.0)",
        "reached = reached | (g_entropy != g_entropy)",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "a-label-that-begins-a-slice-of-triton-is-nowhere",
        LOGPROBS,
        "here = live & (label >= begin) &",
        "here = live & ((label > begin) | (label == 0)) &",
        LOGPROBS_TESTS,
    ),
]
