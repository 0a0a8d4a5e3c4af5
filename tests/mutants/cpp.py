"""Faults of the kernels in C++."""

from . import Mutant

DTYPES = "csrc/common/numbers.h"
SEQUENCES = "csrc/common/sequences.h"
MOMENTS = "csrc/common/moments.h"
GAE = "csrc/credit/gae.cpp"
TOKEN_REWARDS = "csrc/credit/token_rewards.cpp"
WHITEN = "csrc/credit/whiten.cpp"
POLICY_LOSS = "csrc/loss/policy_loss.cpp"
POLICY_LOOPS = "csrc/loss/policy_loss_simd.cpp"
VALUE_LOOPS = "csrc/loss/value_loss_simd.cpp"
SOFTMAX = "csrc/vocabulary/online_softmax.h"
LOGIT_ROWS = "csrc/vocabulary/logit_rows.h"
LOGPROBS = "csrc/vocabulary/token_logprobs.cpp"
LOGPROBS_LOOPS = "csrc/vocabulary/token_logprobs_simd.cpp"
IMPORTANCE = "csrc/weight/importance_weights.cpp"

IN_CPP = ("-k", "baseline")  # The instruction set that every machine has.
LOGPROBS_TESTS = (
    "tests/vocabulary/test_token_logprobs_edges.py",
    "tests/vocabulary/test_token_logprobs.py",
    *IN_CPP,
)
GAE_TESTS = ("tests/credit/test_gae.py", "tests/credit/test_gae_laws.py", *IN_CPP)
POLICY_TESTS = (
    "tests/loss/test_policy_loss.py",
    "tests/loss/test_policy_loss_laws.py",
    "tests/loss/test_policy_loss_bounds.py",
    *IN_CPP,
)
VALUE_TESTS = ("tests/loss/test_value_loss.py", *IN_CPP)
WHITEN_TESTS = ("tests/credit/test_whiten.py", *IN_CPP)
IMPORTANCE_TESTS = ("tests/weight/test_importance_weights.py", *IN_CPP)
REWARDS_TESTS = ("tests/credit/test_token_rewards.py", *IN_CPP)

MUTANTS = [
    # What all share.
    Mutant(
        "bf16-ties-are-rounded-away",
        DTYPES,
        "bits + 0x7fff + ((bits >> 16) & 1)",
        "bits + 0x8000",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "fp16-ties-are-rounded-away",
        DTYPES,
        "0xc8000fffu + ((magnitude >> 13) & 1)",
        "0xc8001000u",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "log-ratios-bounded-by-10-in-cpp",
        "csrc/common/log_ratio.h",
        "kMaxLogRatio = 20;",
        "kMaxLogRatio = 10;",
        ("tests/weight/test_importance_weights.py", *IN_CPP),
    ),
    Mutant(
        "cu_seqlens-of-cpp-may-fall",
        SEQUENCES,
        "cu_seqlens[i] < low ||",
        "cu_seqlens[i] < 0 ||",
        ("tests/credit/test_gae.py::test_cu_seqlens_is_checked", *IN_CPP),
    ),
    Mutant(
        "cu_seqlens-of-cpp-may-end-early",
        SEQUENCES,
        "cu_seqlens[i] != length))",
        "cu_seqlens[i] > length))",
        ("tests/credit/test_gae.py::test_cu_seqlens_is_checked", *IN_CPP),
    ),
    Mutant(
        "moments-merge-with-the-wrong-count",
        MOMENTS,
        "d * d * a.count * share",
        "d * d * b.count * share",
        WHITEN_TESTS,
    ),
    # Vocabulary.
    Mutant(
        "the-last-part-of-a-slice-is-left-out",
        LOGIT_ROWS,
        "for (int64_t i = 1; i < ceil_div(this->rows.vocab, kSlice); ++i)",
        "for (int64_t i = 1; i < this->rows.vocab / kSlice; ++i)",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "a-label-at-the-edge-belongs-to-the-slice-before-too",
        LOGPROBS,
        "label >= begin && label < begin + length",
        "label >= begin && label <= begin + length",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "a-label-that-begins-a-slice-is-nowhere",
        LOGPROBS,
        "label >= begin && label < begin + length",
        "(label > begin || label == 0) && label < begin + length",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "label-v-is-legal",
        LOGIT_ROWS,
        "label >= rows.vocab)",
        "label > rows.vocab)",
        ("tests/vocabulary/test_token_logprobs.py::test_bad_arguments_raise", *IN_CPP),
    ),
    Mutant(
        "a-temperature-whose-inverse-is-infinite-is-legal",
        LOGIT_ROWS,
        " && T(1) / temperature < infinity<T>())",
        ")",
        ("tests/vocabulary/test_token_logprobs.py::test_bad_arguments_raise", *IN_CPP),
    ),
    Mutant(
        "rows-that-only-the-entropy-reaches-get-nothing",
        LOGPROBS,
        "(g.grad_logp == 0 && g.grad_entropy == 0)",
        "g.grad_logp == 0",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "temperatures-repeat-after-32-rows",
        LOGIT_ROWS,
        "rows.temperature_per_row ? row : 0",
        "rows.temperature_per_row ? row % 32 : 0",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "rescaled-entropy-keeps-its-origin",
        SOFTMAX,
        "factor * (a.weighted + shift * a.sum)",
        "factor * a.weighted",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "an-entropy-below-0",
        SOFTMAX,
        "const U not_below_zero = entropy < U(0) ? U(0) : entropy;",
        "const U not_below_zero = entropy;",
        LOGPROBS_TESTS,
        harmless="e^0 is in every sum, and no term of the weighted sum is above 0",
    ),
    Mutant(
        "a-label-of-minus-infinity-has-a-gradient",
        SOFTMAX,
        "  if (c == -infinity<T>()) return T(0);\n",
        "",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "a-negative-gradient-of-the-entropy-is-dropped",
        LOGPROBS_LOOPS,
        "} else if (row.grad_entropy != 0) {",
        "} else if (row.grad_entropy > 0) {",
        LOGPROBS_TESTS,
    ),
    # Credit.
    Mutant(
        "a-terminated-token-sends-to-its-bootstrap",
        GAE,
        "this->truncated(i) && !this->terminated(i);",
        "this->truncated(i);",
        GAE_TESTS,
    ),
    Mutant(
        "a-masked-token-forgets-what-follows",
        GAE,
        "      advantages[i] = returns[i] = X(0);\n",
        "      advantages[i] = returns[i] = X(0), lane.carry.value = 0;\n",
        GAE_TESTS,
    ),
    Mutant(
        "a-lane-that-ends-hands-on-its-carry",
        GAE,
        "      lanes[i] = lanes[--active];\n",
        "      lanes[i] = lanes[--active], lanes[i].carry = lanes[0].carry;\n",
        GAE_TESTS,
    ),
    Mutant(
        "the-bootstrap-of-a-step-after-a-cut-gets-a-gradient",
        GAE,
        "    if (this->cut(i)) lane.carry = {0.0, 0.0};\n",
        "    if (this->terminated(i)) lane.carry = {0.0, 0.0};\n",
        GAE_TESTS,
    ),
    Mutant(
        "a-last-partial-eight-is-left-out",
        WHITEN,
        "for (; i < end; ++i) lanes[0] += term(i);",
        "for (; i + 1 < end; ++i) lanes[0] += term(i);",
        WHITEN_TESTS,
    ),
    Mutant(
        "blocks-overlap-by-one",
        WHITEN,
        "smaller((i + 1) * kBlock, n)",
        "smaller((i + 1) * kBlock + 1, n)",
        WHITEN_TESTS,
    ),
    Mutant(
        "masked-kl-is-a-reward",
        TOKEN_REWARDS,
        "kl && mask[i] ? ",
        "kl ? ",
        REWARDS_TESTS,
    ),
    # Weight.
    Mutant(
        "empty-sequences-are-counted",
        "csrc/weight/token_weights.cpp",
        "length : length > 0;",
        "length : 1;",
        ("tests/weight/test_token_weights.py", *IN_CPP),
    ),
    Mutant(
        "an-empty-sequence-has-a-ratio",
        IMPORTANCE,
        "    if (total[ImportanceStats::tokens] == 0) return;\n",
        "",
        IMPORTANCE_TESTS,
    ),
    Mutant(
        "a-ratio-at-its-lower-bound-is-below-it",
        "csrc/weight/importance_weights.h",
        "below = ratio < low;",
        "below = ratio <= low;",
        IMPORTANCE_TESTS,
    ),
    # Loss.
    Mutant(
        "a-nan-ratio-hides",
        POLICY_LOSS,
        "  show_nan(*out.stats);\n",
        "",
        POLICY_TESTS,
    ),
    Mutant(
        "the-last-partial-eight-of-a-sequence-is-left-out",
        POLICY_LOSS,
        "for (int64_t t = whole; t < n; ++t)",
        "for (int64_t t = whole; t + 1 < n; ++t)",
        POLICY_TESTS,
    ),
    Mutant(
        "a-masked-ratio-is-the-least",
        POLICY_LOOPS,
        "select(kept & (ratio < least[i]), ratio, least[i])",
        "select(ratio < least[i], ratio, least[i])",
        POLICY_TESTS,
    ),
    Mutant(
        "the-kl-takes-the-ratio-of-the-sequence",
        POLICY_LOOPS,
        "T(options.kl_coef), bound, coefficient, ratios, part);",
        "T(options.kl_coef), bound, coefficient, of_sequences, part);",
        POLICY_TESTS,
    ),
    Mutant(
        "the-padding-of-a-block-counts",
        VALUE_LOOPS,
        "      count[i] += select(kept, T(1), T(0));\n",
        "      count[i] += T(1);\n",
        VALUE_TESTS,
    ),
    Mutant(
        "values-within-the-clip-have-no-gradient",
        "csrc/loss/value_loss.h",
        "held * held > error * error;",
        "held * held >= error * error;",
        VALUE_TESTS,
    ),
]
