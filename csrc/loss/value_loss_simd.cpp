// One block of tokens of the value loss: the loss, and then the moments about the block's means.
#include "common/parallel.h"
#include "loss/value_loss.h"
#include "simd/lanes.h"
#include "simd/select.h"

namespace fpg {
namespace {

template <bool kClip, typename T>
void value_pass(const ValueTokens<T>& tokens, int64_t n, T clip, T* __restrict__ coefficient,
                double* part) {
  const T* const values = tokens.values;
  const T* const returns = tokens.returns;
  const T* const old_values = tokens.old_values;
  const T* const weights = tokens.weight;
  T count[kTokenLanes] = {};
  T weight[kTokenLanes] = {};
  T loss[kTokenLanes] = {};
  T clipped[kTokenLanes] = {};
  T target[kTokenLanes] = {};
  T residual[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const T w = weights[t];
      const bool kept = w != T(0);
      const T v = select(kept, values[t], T(0));
      const T r = select(kept, returns[t], T(0));
      const T error = v - r;
      const ValueTerm<T> term =
          kClip ? value_term(error, v, r, select(kept, old_values[t], T(0)), clip)
                : value_term(error);
      coefficient[t] = w * term.slope;
      count[i] += select(kept, T(1), T(0));
      weight[i] += w;
      loss[i] += w * term.value;
      clipped[i] += term.clipped;
      target[i] += r;
      residual[i] -= error;
    }
  }
  part[ValueStats::count] = fold_sum(count);
  part[ValueStats::weight] = fold_sum(weight);
  part[ValueStats::loss] = fold_sum(loss);
  part[ValueStats::clipped] = fold_sum(clipped);
  part[ValueStats::return_mean] = fold_sum(target);
  part[ValueStats::residual_mean] = fold_sum(residual);
}

// Turns the sums of returns and residuals that the first pass left into means and moments.
template <typename T>
void moments_pass(const ValueTokens<T>& tokens, int64_t n, double* part) {
  const T* const values = tokens.values;
  const T* const returns = tokens.returns;
  const T* const weights = tokens.weight;
  const double count = part[ValueStats::count];
  const double kept_count = larger(count, 1.0);
  const T r0 = T(part[ValueStats::return_mean] / kept_count);
  const T e0 = T(part[ValueStats::residual_mean] / kept_count);
  T r1[kTokenLanes] = {};
  T r2[kTokenLanes] = {};
  T e1[kTokenLanes] = {};
  T e2[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const bool kept = weights[t] != T(0);
      const T r = select(kept, returns[t] - r0, T(0));
      const T e = select(kept, (returns[t] - values[t]) - e0, T(0));
      r1[i] += r;
      r2[i] += r * r;
      e1[i] += e;
      e2[i] += e * e;
    }
  }
  const Moments target = moments_about(r0, count, fold_sum(r1), fold_sum(r2));
  const Moments residual = moments_about(e0, count, fold_sum(e1), fold_sum(e2));
  part[ValueStats::return_mean] = target.mean;
  part[ValueStats::return_m2] = target.m2;
  part[ValueStats::residual_mean] = residual.mean;
  part[ValueStats::residual_m2] = residual.m2;
}

// A last block that ends within the lanes is padded with masked tokens, as in the policy loss.
template <typename T>
void value_block(const ValueTokens<T>& in, int64_t n, T clip, T* coefficient, double* part) {
  if (n % kTokenLanes != 0) {
    T copy[5][kTokenBlock];
    const ValueTokens<T> tokens = {padded(in.values, n, copy[0]), padded(in.returns, n, copy[1]),
                                   padded(in.weight, n, copy[2]),
                                   padded(in.old_values, n, copy[3])};
    value_block(tokens, ceil_div(n, kTokenLanes) * kTokenLanes, clip, copy[4], part);
    for (int64_t i = 0; i < n; ++i) coefficient[i] = copy[4][i];
    return;
  }
  const auto pass = in.old_values ? value_pass<true, T> : value_pass<false, T>;
  pass(in, n, clip, coefficient, part);
  moments_pass(in, n, part);
}

}  // namespace

namespace FPG_ISA {

template <>
const ValueLossKernels<float>& table() {
  static constexpr ValueLossKernels<float> kernels = {value_block<float>};
  return kernels;
}
template <>
const ValueLossKernels<double>& table() {
  static constexpr ValueLossKernels<double> kernels = {value_block<double>};
  return kernels;
}

}  // namespace FPG_ISA
}  // namespace fpg
