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
  const Four<T> weight = four(in.weight);
  const Four<T> values = four(in.values);
  const Four<T> returns = four(in.returns);
  const Four<T> old_values = four(kClip ? in.old_values : nullptr);
  Four<T> slopes;
  FourTokens<T> out = {weight, {}, {}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T w = weight.x[i];
    const bool kept = w != T(0);
    const T v = select(kept, values.x[i], T(0));
    const T r = select(kept, returns.x[i], T(0));
    const T error = v - r;
    const ValueTerm<T> term =
        kClip ? value_term(error, v, r, select(kept, old_values.x[i], T(0)), clip)
              : value_term(error);
    slopes.x[i] = w * term.slope;
    out.target.x[i] = r;
    out.residual.x[i] = -error;
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

// The statistics of a block, from the sums of its fields: means, and squared distances from them.
template <typename T>
__device__ const ValueStats& value_moments(const FourTokens<T>& tokens,
                                           const Sums<ValueStats::kFields>& sums) {
  __shared__ ValueStats out;
  const double share = 1.0 / larger(sums.x[ValueStats::count], 1.0);
  const double target = sums.x[ValueStats::return_mean] * share;
  const double residual = sums.x[ValueStats::residual_mean] * share;
  Sums<2> squares = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool kept = tokens.weight.x[i] != T(0);
    const double r = select(kept, tokens.target.x[i] - target, 0.0);
    const double e = select(kept, tokens.residual.x[i] - residual, 0.0);
    squares.x[0] += r * r;
    squares.x[1] += e * e;
  }
  const Sums<2>& total = block_reduce(squares);
  if (threadIdx.x == 0) {
    for (int i = 0; i < ValueStats::kSums; ++i) out.x[i] = sums.x[i];
    out.x[ValueStats::return_mean] = target;
    out.x[ValueStats::return_m2] = total.x[0];
    out.x[ValueStats::residual_mean] = residual;
    out.x[ValueStats::residual_m2] = total.x[1];
  }
  __syncthreads();
  return out;
}

// The statistics of all blocks: sums first, then the distances from the means, of which that of a
// block's mean counts for all its tokens. Moments that merged in pairs would divide in each.
__device__ inline ValueStats merge_value_parts(const Scratch<ValueStats>& scratch) {
  const auto each = [&](const auto& body) {
    for (unsigned part = threadIdx.x; part < gridDim.x; part += kReduceThreads)
      body([&, part](int field) { return __ldcg(&scratch.parts[part].x[field]); });
  };
  Sums<ValueStats::kFields> sums = {};
  each([&](const auto& part) {
    for (int i = 0; i < ValueStats::kSums; ++i) sums.x[i] += part(i);
    const double count = part(ValueStats::count);
    sums.x[ValueStats::return_mean] += count * part(ValueStats::return_mean);
    sums.x[ValueStats::residual_mean] += count * part(ValueStats::residual_mean);
  });
  ValueStats out;
  const Sums<ValueStats::kFields>& total = block_reduce(sums);
  for (int i = 0; i < ValueStats::kFields; ++i) out.x[i] = total.x[i];
  const double share = 1.0 / larger(out.x[ValueStats::count], 1.0);
  const double target = out.x[ValueStats::return_mean] * share;
  const double residual = out.x[ValueStats::residual_mean] * share;
  out.x[ValueStats::return_mean] = target;
  out.x[ValueStats::residual_mean] = residual;
  Sums<2> squares = {};
  each([&](const auto& part) {
    const double count = part(ValueStats::count);
    const double r = part(ValueStats::return_mean) - target;
    const double e = part(ValueStats::residual_mean) - residual;
    squares.x[0] += part(ValueStats::return_m2) + count * (r * r);
    squares.x[1] += part(ValueStats::residual_m2) + count * (e * e);
  });
  const Sums<2>& distances = block_reduce(squares);
  out.x[ValueStats::return_m2] = distances.x[0];
  out.x[ValueStats::residual_m2] = distances.x[1];
  return out;
}

template <bool kClip, typename T>
__global__ void __launch_bounds__(kReduceThreads)
    value_loss_kernel(ValueTokens<T> tokens, int64_t count, T clip, T* coefficient, T* loss,
                      ValueStats* out, Scratch<ValueStats> scratch) {
  const int64_t first = (int64_t(blockIdx.x) * kReduceThreads + threadIdx.x) * 4;
  Sums<ValueStats::kFields> sums = {};
  const FourTokens<T> four =
      value_four<kClip>(tokens, first, count - first, clip, coefficient, sums);
  if (!store_part(value_moments(four, block_reduce(sums)), scratch)) return;
  const ValueStats stats = merge_value_parts(scratch);
  if (threadIdx.x != 0) return;
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
