// The value loss of a batch of tokens, four to a thread, in one launch.
#include "common/bind.h"
#include "common/cuda_reduce.h"
#include "common/dtype.h"
#include "loss/value_loss.h"

namespace fpg {
namespace {

template <typename T>
struct FourTokens {
  Four<T> weight, target, residual;
};

// Writes the coefficients; adds up count, weight, loss, clipped, and the returns and residuals.
template <bool kClip, typename T>
__device__ FourTokens<T> value_four(const ValueTokens<T>& in, int64_t first, int64_t left, T clip,
                                    T* coefficient, Sums<ValueStats::kFields>& sums) {
  const auto four = [&](const T* x) { return load_four(x ? x + first : x, left, T(0)); };
  const Four<T> weight = four(in.weight), values = four(in.values), returns = four(in.returns);
  const Four<T> old_values = four(kClip ? in.old_values : nullptr);
  Four<T> slopes;
  FourTokens<T> out = {weight, {}, {}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T w = weight.x[i];
    const bool kept = w != T(0);
    const T v = select(kept, values.x[i], T(0)), r = select(kept, returns.x[i], T(0));
    const T error = v - r;
    const ValueTerm<T> term =
        kClip ? value_term(error, v, r, select(kept, old_values.x[i], T(0)), clip)
              : value_term(error);
    slopes.x[i] = w * term.slope;
    out.target.x[i] = r, out.residual.x[i] = -error;
    sums.x[ValueStats::count] += kept;
    sums.x[ValueStats::weight] += w;
    sums.x[ValueStats::loss] += w * term.value;
    sums.x[ValueStats::clipped] += term.clipped;
    sums.x[ValueStats::return_mean] += r;
    sums.x[ValueStats::residual_mean] -= error;
  }
  store_four(coefficient + first, left, slopes);
  return out;
}

// Sums of squared distances from the block's means, which replace the sums.
template <typename T>
__device__ void value_moments(const FourTokens<T>& tokens, ValueStats& stats) {
  const double count = larger(stats.x[ValueStats::count], 1.0);
  const double target = stats.x[ValueStats::return_mean] /= count;
  const double residual = stats.x[ValueStats::residual_mean] /= count;
  Sums<2> squares = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool kept = tokens.weight.x[i] != T(0);
    const double r = select(kept, tokens.target.x[i] - target, 0.0);
    const double e = select(kept, tokens.residual.x[i] - residual, 0.0);
    squares.x[0] += r * r, squares.x[1] += e * e;
  }
  block_reduce(squares);
  stats.x[ValueStats::return_m2] = squares.x[0], stats.x[ValueStats::residual_m2] = squares.x[1];
}

template <bool kClip, typename T>
__global__ void __launch_bounds__(kReduceThreads)
    value_loss_kernel(ValueTokens<T> tokens, int64_t count, T clip, T* coefficient, T* loss,
                      ValueStats* out, Scratch<ValueStats> scratch) {
  const int64_t first = (int64_t(blockIdx.x) * kReduceThreads + threadIdx.x) * 4;
  Sums<ValueStats::kFields> sums = {};
  const FourTokens<T> four =
      value_four<kClip>(tokens, first, count - first, clip, coefficient, sums);
  block_reduce(sums);
  ValueStats stats;
  for (int i = 0; i < ValueStats::kFields; ++i) stats.x[i] = sums.x[i];
  value_moments(four, stats);
  if (!grid_reduce(stats, scratch)) return;
  *out = stats;
  *loss = T(stats.x[ValueStats::loss]);
}

void value_loss(const ValueLossArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel =
        in.inputs.old_values ? value_loss_kernel<true, T> : value_loss_kernel<false, T>;
    launch_reduce(kernel, in.inputs.count, in.scratch, in.stream, tokens_of<T>(in.inputs),
                  in.inputs.count, T(in.inputs.clip), static_cast<T*>(in.coefficient),
                  static_cast<T*>(in.loss), in.stats);
  });
}

FPG_BIND(value_loss, value_loss)
FPG_BIND_STATISTICS(ValueStats)

}  // namespace
}  // namespace fpg
