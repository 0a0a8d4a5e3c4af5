// One block of tokens of the importance weights.
#include "common/parallel.h"
#include "simd/lanes.h"
#include "simd/select.h"
#include "weight/importance_weights.h"

namespace fpg {
namespace {

// `n` is a multiple of the lanes, and `kept` is 0 where a token is masked. The log-ratios are
// summed in double: an exponential follows.
template <typename T>
void importance_pass(const T* logp, const T* behavior_logp, const T* kept, int64_t n,
                     const ImportanceBounds& bounds, T* __restrict__ weights, double* part) {
  const T low = T(bounds.low);
  const T high = T(bounds.high);
  const bool zero = bounds.zero;
  double sum_d[kTokenLanes] = {};
  T count[kTokenLanes] = {};
  T k3[kTokenLanes] = {};
  T sum[kTokenLanes] = {};
  T used[kTokenLanes] = {};
  T used_sq[kTokenLanes] = {};
  T n_low[kTokenLanes] = {};
  T n_high[kTokenLanes] = {};
  T least[kTokenLanes];
  T most[kTokenLanes];
  for (int64_t i = 0; i < kTokenLanes; ++i) {
    least[i] = infinity<T>();
    most[i] = -infinity<T>();
  }
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const bool is_kept = kept[t] != T(0);
      const T x = select(is_kept, logp[t], T(0));
      const T y = select(is_kept, behavior_logp[t], T(0));
      const T d = bounded(log_ratio(x, y));
      const ExpExcess<T> e = exp_excess(d);
      count[i] += kept[t];
      sum_d[i] += d;
      k3[i] += e.excess;
      const ImportanceWeight<T> weighed = importance_weight(e.exp, low, high, zero);
      const T w = select(is_kept, weighed.weight, T(0));
      weights[t] = w;
      sum[i] += select(is_kept, e.exp, T(0));
      used[i] += w;
      used_sq[i] += w * w;
      n_low[i] += select(is_kept, weighed.below, T(0));
      n_high[i] += select(is_kept, weighed.above, T(0));
      least[i] = smaller(least[i], select(is_kept, e.exp, infinity<T>()));
      most[i] = larger(most[i], select(is_kept, e.exp, -infinity<T>()));
    }
  }
  part[ImportanceStats::tokens] = part[ImportanceStats::count] = fold_sum(count);
  part[ImportanceStats::k1] = -fold_sum(sum_d);
  part[ImportanceStats::k3] = fold_sum(k3);
  part[ImportanceStats::ratio] = fold_sum(sum);
  part[ImportanceStats::weight] = fold_sum(used);
  part[ImportanceStats::weight_sq] = fold_sum(used_sq);
  part[ImportanceStats::low] = fold_sum(n_low);
  part[ImportanceStats::high] = fold_sum(n_high);
  part[ImportanceStats::ratio_min] = fold_min(least);
  part[ImportanceStats::ratio_max] = fold_max(most);
}

// A last block that ends within the lanes is padded with masked tokens, as in the policy loss.
template <typename T>
void importance_block(const ImportanceTokens<T>& in, int64_t n, const ImportanceBounds& bounds,
                      T* weights, double* part) {
  const int64_t whole = ceil_div(n, kTokenLanes) * kTokenLanes;
  // The mask is copied to T: GCC makes narrow vectors of a loop with bytes in it. The zeros behind
  // its last token are written first, for all of the last lanes.
  T kept[kTokenBlock];
  for (int64_t i = whole - kTokenLanes; i < whole; ++i) kept[i] = T(0);
  for (int64_t i = 0; i < n; ++i) kept[i] = T(in.mask[i]);
  if (n == whole) return importance_pass(in.logp, in.behavior_logp, kept, n, bounds, weights, part);
  T copy[3][kTokenBlock];
  importance_pass(padded(in.logp, n, copy[0]), padded(in.behavior_logp, n, copy[1]), kept, whole,
                  bounds, copy[2], part);
  for (int64_t i = 0; i < n; ++i) weights[i] = copy[2][i];
}

}  // namespace

namespace FPG_ISA {

template <>
const ImportanceKernels<float>& table() {
  static constexpr ImportanceKernels<float> kernels = {importance_block<float>};
  return kernels;
}
template <>
const ImportanceKernels<double>& table() {
  static constexpr ImportanceKernels<double> kernels = {importance_block<double>};
  return kernels;
}

}  // namespace FPG_ISA
}  // namespace fpg
