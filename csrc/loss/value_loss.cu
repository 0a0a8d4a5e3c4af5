// The value loss of a batch of tokens, four to a thread, in one launch.
#include "common/cuda_reduce.h"
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
                                    T* coefficient, Sums<kValueFields>& sums) {
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
    sums.x[kValueCount] += kept;
    sums.x[kValueWeight] += w;
    sums.x[kValueLoss] += w * term.value;
    sums.x[kValueClipped] += term.clipped;
    sums.x[kReturnMean] += r;
    sums.x[kResidualMean] -= error;
  }
  store_four(coefficient + first, left, slopes);
  return out;
}

// Sums of squared distances from the block's means, which replace the sums.
template <typename T>
__device__ void value_moments(const FourTokens<T>& tokens, ValueStats& stats) {
  const double count = larger(stats.x[kValueCount], 1.0);
  const double target = stats.x[kReturnMean] /= count;
  const double residual = stats.x[kResidualMean] /= count;
  Sums<2> squares = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool kept = tokens.weight.x[i] != T(0);
    const double r = select(kept, tokens.target.x[i] - target, 0.0);
    const double e = select(kept, tokens.residual.x[i] - residual, 0.0);
    squares.x[0] += r * r, squares.x[1] += e * e;
  }
  block_reduce(squares);
  stats.x[kReturnM2] = squares.x[0], stats.x[kResidualM2] = squares.x[1];
}

template <bool kClip, typename T>
__global__ void __launch_bounds__(kReduceThreads)
    value_loss_kernel(ValueTokens<T> tokens, int64_t count, T clip, ValueOut<T> out,
                      Scratch<ValueStats> scratch) {
  const int64_t first = (int64_t(blockIdx.x) * kReduceThreads + threadIdx.x) * 4;
  Sums<kValueFields> sums = {};
  const FourTokens<T> four =
      value_four<kClip>(tokens, first, count - first, clip, out.coefficient, sums);
  block_reduce(sums);
  ValueStats stats;
  for (int i = 0; i < kValueFields; ++i) stats.x[i] = sums.x[i];
  value_moments(four, stats);
  if (!grid_reduce(stats, scratch)) return;
  *out.stats = stats;
  *out.loss = T(stats.x[kValueLoss]);
}

}  // namespace

template <typename T>
void value_loss(const ValueTokens<T>& tokens, int64_t count, T clip, const ValueOut<T>& out,
                const Scratch<ValueStats>& scratch, Stream stream) {
  const auto kernel = tokens.old_values ? value_loss_kernel<true, T> : value_loss_kernel<false, T>;
  launch_reduce(kernel, count, scratch, stream, tokens, count, clip, out);
}

template void value_loss(const ValueTokens<float>&, int64_t, float, const ValueOut<float>&,
                         const Scratch<ValueStats>&, Stream);
template void value_loss(const ValueTokens<double>&, int64_t, double, const ValueOut<double>&,
                         const Scratch<ValueStats>&, Stream);

}  // namespace fpg
