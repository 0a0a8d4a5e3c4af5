"""Faults of what the vocabulary ops share: nearly certain labels, tiles of a head, kept sets."""

from . import Mutant

AUTOGRAD = "fastpg/_autograd.py"
FROZEN_HEAD = "fastpg/ops/vocabulary/frozen_head_blas.py"
HEAD = "fastpg/ops/vocabulary/head.py"
LOGIT_ROWS = "fastpg/ops/vocabulary/logit_rows.py"
ROW_RESULTS = "fastpg/ops/vocabulary/row_results_triton.py"
SHARDS = "fastpg/ops/vocabulary/shards.py"
SOFTMAX = "csrc/vocabulary/online_softmax.h"
SUPPORT = "fastpg/ops/vocabulary/support.py"

NEARLY_CERTAIN = ("tests/vocabulary/test_nearly_certain.py",)
FROZEN_TESTS = ("tests/vocabulary/test_frozen_head.py",)
SUPPORT_TESTS = ("tests/vocabulary/test_support.py",)

MUTANTS = [
    Mutant(
        "the-label-is-in-the-sum-again",
        SOFTMAX,
        "d == U(0) ? log1p(rest.sum) : log(sum)",
        "log(sum)",
        NEARLY_CERTAIN,
    ),
    Mutant(
        "a-margin-of-80-is-rounded-to-fp32",
        SOFTMAX,
        "label >= others.max ? join_label<double>",
        "label >= others.max ? join_label<T>",
        NEARLY_CERTAIN,
    ),
    Mutant(
        "tiles-are-merged-in-a-sum-that-holds-1",
        SHARDS,
        "above_one.log1p()",
        "(above_one + 1).log()",
        NEARLY_CERTAIN,
    ),
    Mutant(
        "the-label-of-a-tile-stands-in-for-that-of-the-row",
        HEAD,
        "label_logit = torch.where(here, found, label_logit)",
        "label_logit = found",
        ("tests/vocabulary/test_linear_token_logprobs.py",),
    ),
    Mutant(
        "another-lane-is-read-without-the-label",
        ROW_RESULTS,
        "own = label % STRIDE // VECTOR",
        "own = (label + VECTOR) % STRIDE // VECTOR",
        (*NEARLY_CERTAIN, "-k", "triton"),
    ),
    Mutant(
        "a-gap-is-scaled-by-the-plain-exponential-in-triton",
        ROW_RESULTS,
        "tl.exp((x - k * LN2_HIGH) - k * LN2_LOW + rounded_away) * tl.exp2(k)",
        "tl.exp(x)",
        (*NEARLY_CERTAIN, "-k", "triton"),
    ),
    Mutant(
        "logits-are-overwritten-in-a-checkpoint",
        LOGIT_ROWS,
        "_top_saved_tensors_default_hooks(False) is not None",
        "_top_saved_tensors_default_hooks(False) == 0",
        ("tests/vocabulary/test_inplace_backward.py",),
    ),
    Mutant(
        "exchanged-memory-is-not-noticed",
        AUTOGRAD,
        "    if forms != ctx.forms:\n",
        "    if False:\n",
        ("tests/common/test_contract.py", "-k", "exchanged"),
    ),
    Mutant(
        "what-earlier-tiles-summed-is-not-rescaled",
        FROZEN_HEAD,
        "                total *= shrink\n",
        "                pass\n",
        FROZEN_TESTS,
    ),
    Mutant(
        "the-label-is-left-in-the-sum-of-a-frozen-head",
        FROZEN_HEAD,
        "tile.logits[at_labels].masked_fill(here, 0.0)",
        "tile.logits[at_labels]",
        FROZEN_TESTS,
    ),
    Mutant(
        "a-label-outside-its-set-counts",
        SUPPORT,
        "torch.where(has_label, of_label, -math.inf)",
        "of_label",
        SUPPORT_TESTS,
    ),
    Mutant(
        "kept-sets-are-at-temperature-1",
        SUPPORT,
        "return grad / per_entry(x.temperature.double(), entries)",
        "return grad",
        SUPPORT_TESTS,
    ),
]
