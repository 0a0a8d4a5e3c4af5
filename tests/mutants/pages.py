"""Faults of the pages of the ops: references, checks, statistics, gradients, and what makes ops."""

from . import Mutant

AUTOGRAD = "fastpg/_autograd.py"
OP = "fastpg/_op.py"
RECORD = "fastpg/_record.py"
CHECKS = "fastpg/ops/common/checks.py"
MOMENTS = "fastpg/ops/common/moments.py"
STATS = "fastpg/ops/common/stats.py"
GAE = "fastpg/ops/credit/gae.py"
GROUP_CENTER = "fastpg/ops/credit/group_center.py"
TOKEN_REWARDS = "fastpg/ops/credit/token_rewards.py"
WHITEN = "fastpg/ops/credit/whiten.py"
KL_ESTIMATE = "fastpg/ops/loss/kl_estimate.py"
FROM_LOGITS = "fastpg/ops/loss/policy_loss_from_logits.py"
POLICY_LOSS = "fastpg/ops/loss/policy_loss.py"
SURROGATES = "fastpg/ops/loss/surrogates.py"
VALUE_LOSS = "fastpg/ops/loss/value_loss.py"
SHARDS = "fastpg/ops/vocabulary/shards.py"
ROW_SOFTMAX = "fastpg/ops/vocabulary/row_softmax.py"
TOKEN_LOGPROBS = "fastpg/ops/vocabulary/token_logprobs.py"
IMPORTANCE = "fastpg/ops/weight/importance_weights.py"
TOKEN_WEIGHTS = "fastpg/ops/weight/token_weights.py"

ON_REFERENCE = ("-k", "reference")
GAE_TESTS = ("tests/credit/test_gae.py", "tests/credit/test_gae_laws.py", *ON_REFERENCE)
POLICY_TESTS = (
    "tests/loss/test_policy_loss.py",
    "tests/loss/test_policy_loss_laws.py",
    "tests/loss/test_policy_loss_bounds.py",
    *ON_REFERENCE,
)
LOGPROBS_TESTS = ("tests/vocabulary/test_token_logprobs.py", *ON_REFERENCE)
MERGING = ("tests/common/test_merge_stats.py",)

MUTANTS = [
    # What every op is made of.
    Mutant(
        "gradients-go-to-each-others-inputs",
        AUTOGRAD,
        "zip(gradients, wanted, strict=True)",
        "zip(reversed(list(gradients)), wanted, strict=True)",
        ("tests/credit/test_token_rewards.py::test_gradients", *ON_REFERENCE),
    ),
    Mutant(
        "saved-tensors-come-back-in-another-order",
        "fastpg/_record.py",
        'f"{part}[{len(parts[part])}]"',
        'f"{part}[{-1 - len(parts[part])}]"',
        ("tests/credit/test_token_rewards.py::test_gradients", *ON_REFERENCE),
    ),
    Mutant(
        "zeros-for-results-that-nobody-used",
        AUTOGRAD,
        "ctx.set_materialize_grads(False)",
        "ctx.set_materialize_grads(True)",
        ("tests/common/test_contract.py",),
    ),
    Mutant(
        "statistics-require-a-gradient",
        AUTOGRAD,
        "            if op.constants:\n",
        "            if op.constants and False:\n",
        ("tests/common/test_contract.py",),
    ),
    Mutant(
        "a-second-derivative-is-dropped-in-silence",
        AUTOGRAD,
        "if torch.is_grad_enabled() and not torch.compiler.is_compiling():",
        "if torch.compiler.is_compiling():",
        ("tests/loss/test_policy_loss_laws.py::test_double_backward_raises_and_single_repeats",),
    ),
    Mutant(
        "tangents-are-dropped-in-silence",
        AUTOGRAD,
        "return forward_ad._current_level < 0",
        "return True",
        ("tests/credit/test_gae.py::test_other_derivatives_raise",),
    ),
    Mutant(
        "records-keep-their-strides",
        RECORD,
        "[x.contiguous() if isinstance(x, Tensor) else x for x in record]",
        "list(record)",
        ("tests/credit/test_gae_laws.py::test_any_strides", "-k", "triton"),
    ),
    Mutant(
        "vmap-loops-over-the-batch",
        OP,
        '        LIBRARY.impl(self.name, self._refuse_vmap, "FuncTorchBatched")\n',
        "",
        ("tests/common/test_contract.py",),
    ),
    Mutant(
        "every-string-has-code-0",
        RECORD,
        'members[place] = f"table_{place}[{members[place]}]"',
        'members[place] = "0"',
        ("tests/weight/test_token_weights.py::test_matches_a_loop_over_the_sequences",),
    ),
    Mutant(
        "swapped-fields-are-imported",
        OP,
        "        if ours != theirs:\n",
        "        if sorted(ours) != sorted(theirs):\n",
        ("tests/common", "tests/house/test_build.py"),
    ),
    # What several pages ask.
    Mutant(
        "the-first-tensor-alone-decides-the-dtype",
        CHECKS,
        "dtype = compute_dtype(op, **tensors)",
        "dtype = compute_dtype(op, **{beside: first})",
        ("tests/common/test_shared_checks.py",),
    ),
    Mutant(
        "a-discount-of-nan-is-a-fraction",
        CHECKS,
        "if not (least >= 0 and most <= 1):",
        "if least < 0 or most > 1:",
        ("tests/credit/test_gae.py::test_bad_arguments_raise",),
    ),
    Mutant(
        "a-masked-discount-is-checked",
        CHECKS,
        "bad = bad & mask if mask is not None and mask.shape == x.shape else bad",
        "bad = bad | bad",
        GAE_TESTS,
    ),
    Mutant(
        "cu_seqlens-may-end-early",
        CHECKS,
        "bad[-1] |= cu_seqlens[-1] != len(tokens)",
        "bad[-1] |= cu_seqlens[-1] > len(tokens)",
        ("tests/credit/test_gae.py::test_cu_seqlens_is_checked", *ON_REFERENCE),
    ),
    Mutant(
        "the-first-token-belongs-to-the-sequence-before",
        CHECKS,
        "positions, right=True)",
        "positions)",
        ("tests/common/test_shared_checks.py",),
    ),
    Mutant(
        "a-masked-token-is-the-last",
        CHECKS,
        "return mask & (unmasked_from(mask, cu_seqlens) == 1)",
        "return unmasked_from(mask, cu_seqlens) == 1",
        (*GAE_TESTS[:2], "tests/credit/test_token_rewards.py", *ON_REFERENCE),
    ),
    Mutant(
        "a-temperature-whose-inverse-is-infinite",
        CHECKS,
        "if not 1 / most < value < most:",
        "if not 0 < value < most:",
        ("tests/vocabulary/test_token_logprobs.py::test_bad_arguments_raise",),
    ),
    Mutant(
        "moments-of-parts-are-merged-without-their-counts",
        MOMENTS,
        "(parts.m2 + parts.n * (parts.mean - mean) ** 2)",
        "(parts.m2 + (parts.mean - mean) ** 2)",
        MERGING,
    ),
    Mutant(
        "the-greatest-ratio-is-the-least-of-the-parts",
        STATS,
        "minima.amin(0), maxima.amax(0)",
        "minima.amin(0), maxima.amin(0)",
        (*MERGING, "tests/loss/test_policy_loss_laws.py::test_any_split_adds_up", *ON_REFERENCE),
    ),
    Mutant(
        "a-reference-kl-of-0-is-not-reported",
        STATS,
        'if s[f"has_{name}"]}',
        "if s[name]}",
        MERGING,
    ),
    Mutant(
        "kl-per-sequence",
        STATS,
        '"kl": s["k1"] / tokens,',
        '"kl": s["k1"] / n,',
        (*MERGING, "tests/weight/test_importance_weights.py", *ON_REFERENCE),
    ),
    # Vocabulary.
    Mutant(
        "shards-are-merged-at-temperature-1",
        SHARDS,
        "finite_max(top).double()) / temperature.double()\n",
        "finite_max(top).double())\n",
        ("tests/vocabulary/test_vocab_parallel.py",),
    ),
    Mutant(
        "an-empty-share-of-a-shard-is-nan",
        SHARDS,
        "torch.where(share == 0, 0.0, share * (parts.entropy.double() - log_share))",
        "share * (parts.entropy.double() - log_share)",
        ("tests/vocabulary/test_vocab_parallel.py",),
    ),
    Mutant(
        "gradient-at-the-label-by-subtraction",
        ROW_SOFTMAX,
        "torch.where(is_label, -torch.expm1(logp), -p)",
        "torch.where(is_label, 1 - p, -p)",
        ("tests/vocabulary/test_nearly_certain.py", *ON_REFERENCE),
    ),
    Mutant(
        "minus-infinity-has-a-gradient",
        ROW_SOFTMAX,
        "    grad = torch.where(capped == -math.inf, 0.0, grad)\n",
        "",
        LOGPROBS_TESTS,
    ),
    Mutant(
        "the-gradient-of-the-entropy-is-lost-where-it-is-alone",
        TOKEN_LOGPROBS,
        "        grad_logp = torch.zeros_like(x.stats[0])\n",
        "        return Gradient(torch.zeros_like(x.inputs.logits))\n",
        LOGPROBS_TESTS,
    ),
    # Credit.
    Mutant(
        "the-first-token-hands-on-from-the-sequence-before",
        GAE,
        "tokens.kept | tokens.ends.roll(1, 1)",
        "tokens.kept | tokens.ends",
        GAE_TESTS,
    ),
    Mutant(
        "a-terminated-token-reads-its-bootstrap",
        GAE,
        "done & ~terminal",
        "done",
        GAE_TESTS,
    ),
    Mutant(
        "one-value-is-divided-by-eps",
        WHITEN,
        "torch.where(moments.n > 1,",
        "torch.where(moments.n > 0,",
        ("tests/credit/test_whiten.py", *ON_REFERENCE),
    ),
    Mutant(
        "the-gradient-keeps-no-mean",
        WHITEN,
        "        grad_x = grad_x + mean_grad\n",
        "        pass\n",
        ("tests/credit/test_whiten.py::test_gradients", *ON_REFERENCE),
    ),
    Mutant(
        "a-spread-of-0-has-a-gradient-of-nan",
        GROUP_CENTER,
        "torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)",
        "torch.where(varies, variance.sqrt(), 0.0)",
        ("tests/credit/test_group_center.py",),
    ),
    Mutant(
        "an-infinite-kl-of-coefficient-0-is-nan",
        TOKEN_REWARDS,
        "if kl is None or kl_coef == 0:",
        "if kl is None:",
        ("tests/credit/test_token_rewards.py", *ON_REFERENCE),
    ),
    # Weight.
    Mutant(
        "an-infinite-denominator",
        TOKEN_WEIGHTS,
        "if not 0 <= denom < math.inf:",
        "if not 0 <= denom <= math.inf:",
        ("tests/weight/test_token_weights.py::test_bad_arguments_raise", *ON_REFERENCE),
    ),
    Mutant(
        "an-upper-bound-of-0",
        IMPORTANCE,
        "if not (low <= high and low < math.inf and high > 0):",
        "if not low <= high:",
        ("tests/weight/test_importance_weights.py::test_bad_arguments_raise",),
    ),
    # Loss.
    Mutant(
        "log-ratios-are-bounded-by-10",
        "fastpg/ops/common/log_ratio.py",
        "MAX_LOG_RATIO = 20",
        "MAX_LOG_RATIO = 10",
        (*POLICY_TESTS[:2], "tests/weight/test_importance_weights.py", *ON_REFERENCE),
    ),
    Mutant(
        "tokens-at-the-dual-clip-are-not-counted",
        SURROGATES,
        "slope, too_low, too_high, dual)",
        "slope, too_low, too_high, too_low & too_high)",
        POLICY_TESTS,
    ),
    Mutant(
        "cispo-counts-tokens-without-an-advantage",
        SURROGATES,
        "too_low = (advantages != 0) & (r.value < options.low)",
        "too_low = r.value < options.low",
        POLICY_TESTS,
    ),
    Mutant(
        "reinforce-of-an-infinite-log-prob-is-nan",
        SURROGATES,
        "torch.where((advantages == 0) | impossible, 0.0, slope * logp)",
        "slope * logp",
        POLICY_TESTS,
    ),
    Mutant(
        "the-entropy-has-the-factor-1",
        POLICY_LOSS,
        "grad_entropy = grad_loss * -entropy_coef * saved.weight",
        "grad_entropy = -entropy_coef * saved.weight",
        POLICY_TESTS,
    ),
    Mutant(
        "the-value-loss-has-the-factor-1",
        VALUE_LOSS,
        "return Gradients(grad_loss * saved.coefficient)",
        "return Gradients(saved.coefficient)",
        ("tests/loss/test_value_loss.py", *ON_REFERENCE),
    ),
    Mutant(
        "both-gradients-of-the-kl-have-one-sign",
        KL_ESTIMATE,
        "-grad_logp if x.ref_logp.requires_grad",
        "grad_logp if x.ref_logp.requires_grad",
        ("tests/loss/test_kl_estimate.py::test_gradients", *ON_REFERENCE),
    ),
    Mutant(
        "overwritten-logits-do-not-raise",
        OP,
        "            torch.autograd.graph.increment_version(flatten(x)[place])",
        "            pass",
        (
            "tests/loss/test_policy_loss_from_logits.py"
            "::test_who_saved_the_logits_raises_once_they_are_overwritten",
        ),
    ),
    Mutant(
        "a-gradient-is-handed-over-twice",
        FROM_LOGITS,
        "saved.handed_over.done = True",
        "saved.handed_over.done = False",
        ("tests/loss/test_policy_loss_from_logits.py::test_a_second_backward_raises",),
    ),
    Mutant(
        "only-a-factor-above-1-scales-the-gradient",
        FROM_LOGITS,
        "x.factor != 1:",
        "x.factor > 1:",
        ("tests/loss/test_policy_loss_from_logits.py", *ON_REFERENCE),
    ),
]
