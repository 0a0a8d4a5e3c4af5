"""Faults of the kernels in CUDA C++, which run in `cuda_on_cpu` where there is no GPU."""

from . import Mutant

REDUCE = "csrc/common/cuda_reduce.h"
GAE = "csrc/credit/gae.cu"
SCAN = "csrc/credit/gae_scan.h"
POLICY_LOSS = "csrc/loss/policy_loss.cu"
VALUE_LOSS = "csrc/loss/value_loss.cu"

IN_CUDA = ("-k", "cuda-on-cpu")
GAE_TESTS = ("tests/credit/test_gae_laws.py", "tests/credit/test_gae.py", *IN_CUDA)
POLICY_TESTS = (
    "tests/loss/test_policy_loss_laws.py",
    "tests/loss/test_policy_loss_bounds.py",
    "tests/loss/test_policy_loss.py",
    *IN_CUDA,
)
VALUE_TESTS = ("tests/loss/test_value_loss.py", *IN_CUDA)

MUTANTS = [
    Mutant(
        "a-ticket-wraps-one-launch-late",
        REDUCE,
        "atomicInc(scratch.ticket, gridDim.x - 1)",
        "atomicInc(scratch.ticket, gridDim.x)",
        (
            "tests/loss/test_policy_loss_laws.py::test_a_ticket_serves_launch_after_launch",
            *IN_CUDA,
        ),
    ),
    Mutant(
        "as-many-parts-as-threads-are-merged",
        REDUCE,
        "for (unsigned i = threadIdx.x / kFields; i < gridDim.x; i += kReduceThreads / kFields)",
        "if (const unsigned i = threadIdx.x / kFields; i < gridDim.x)",
        ("tests/loss/test_policy_loss_laws.py::test_every_block_is_merged", *IN_CUDA),
    ),
    Mutant(
        "the-last-warp-of-a-block-is-left-out",
        REDUCE,
        "for (int i = 1; i < kReduceWarps; ++i)",
        "for (int i = 1; i < kReduceWarps - 1; ++i)",
        VALUE_TESTS,
    ),
    Mutant(
        "a-block-of-tiles-is-full-if-its-first-is",
        SCAN,
        ": tile + count <= tiles - partial",
        ": tile < tiles - partial",
        GAE_TESTS,
    ),
    Mutant(
        "a-last-partial-tile-is-full",
        SCAN,
        "tile >= partial && tile + count <= tiles",
        "tile + count <= tiles",
        GAE_TESTS,
    ),
    Mutant(
        "a-lane-leaves-out-its-neighbour",
        SCAN,
        "if (lane - distance >= first) f",
        "if (lane - distance > first) f",
        GAE_TESTS,
    ),
    Mutant(
        "a-lane-without-tokens-before-it-has-the-message-of-the-first",
        SCAN,
        "31 - __clz(lower) : 0), lower != 0};",
        "31 - __clz(lower) : 0), all != 0};",
        GAE_TESTS,
    ),
    Mutant(
        "a-cut-lets-nan-through-in-cuda",
        SCAN,
        "return kCuts && a == 0 ? b : b + a * x;",
        "return b + a * x;",
        GAE_TESTS,
    ),
    Mutant(
        "the-message-of-the-first-warp",
        SCAN,
        "return all ? warps[31 - __clz(all)]",
        "return all ? warps[begin]",
        GAE_TESTS,
    ),
    Mutant(
        "messages-do-not-pass-from-group-to-group",
        GAE,
        "    if (mine) carry.message = all.last[31 - __clz(mine)].message;\n",
        "",
        GAE_TESTS,
    ),
    Mutant(
        "the-message-of-a-neighbour",
        GAE,
        "given >> team.begin << team.begin & ((2u << warp) - 1)",
        "given & ((2u << warp) - 1)",
        GAE_TESTS,
    ),
    Mutant(
        "every-warp-begins-where-its-team-does",
        GAE,
        "all.x[warp] = warp == team.begin ? carry.x : before;",
        "all.x[warp] = carry.x;",
        GAE_TESTS,
    ),
    Mutant(
        "the-maps-of-neighbours-are-composed",
        GAE,
        "lane - warp + team.begin);",
        "lane - warp);",
        GAE_TESTS,
    ),
    Mutant(
        "a-part-of-a-sequence-begins-anew",
        GAE,
        "carry.x = maps[group](carry.x);",
        "carry.x = 0;",
        GAE_TESTS,
    ),
    Mutant(
        "a-part-looks-for-a-message-in-one-group",
        GAE,
        "for (int group = team.part.begin - 1; group >= 0; --group) {",
        "if (const int group = team.part.begin - 1; group >= 0) {",
        GAE_TESTS,
    ),
    Mutant(
        "a-nan-ratio-hides-in-cuda",
        POLICY_LOSS,
        "  show_nan(stats);\n",
        "",
        POLICY_TESTS,
    ),
    Mutant(
        "the-kl-takes-the-ratio-of-the-sequence-in-cuda",
        POLICY_LOSS,
        "kl(d_ref, token_ratio)",
        "kl(d_ref, ratio)",
        POLICY_TESTS,
    ),
    Mutant(
        "a-long-sequence-has-the-ratio-of-its-beginning",
        POLICY_LOSS,
        "    own.x[1] += kept;\n",
        "    own.x[1] += kept;\n    break;\n",
        POLICY_TESTS,
    ),
    Mutant(
        "the-moments-of-a-block-count-masked-tokens",
        VALUE_LOSS,
        "const double r = select(kept, tokens.target.x[i] - target, 0.0);",
        "const double r = tokens.target.x[i] - target;",
        VALUE_TESTS,
    ),
    Mutant(
        "a-lane-sends-what-it-keeps",
        REDUCE,
        "select(upper, stats.x[i], stats.x[i + kHalf]);",
        "select(upper, stats.x[i + kHalf], stats.x[i]);",
        VALUE_TESTS,
    ),
    Mutant(
        "the-mean-of-a-block-counts-for-one-token",
        VALUE_LOSS,
        "part(ValueStats::return_m2) + count * (r * r)",
        "part(ValueStats::return_m2) + r * r",
        VALUE_TESTS,
    ),
]
