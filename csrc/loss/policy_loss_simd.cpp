// One block of tokens of the policy loss: a pass over the first-level cache for the ratios and one
// for each summand of the loss, so that no option multiplies the loops of another.
#include "common/parallel.h"
#include "loss/policy_loss.h"
#include "simd/lanes.h"
#include "simd/select.h"

namespace fpg {
namespace {

// The ratios of a block, and their derivatives: those of ordinary tokens are the ratios themselves.
template <typename T>
struct Ratios {
  alignas(64) T value[kTokenBlock];
  alignas(64) T held_slope[kTokenBlock];
  const T* slope = value;
};

// The ratio of each token, 1 at masked ones; false if a derivative is not the ratio. This pass
// computes more than it reads: what the passes after it read comes from memory meanwhile.
template <typename T>
bool ratio_pass(const PolicyTokens<T>& tokens, int64_t n, T most, T* __restrict__ ratios,
                double* part) {
  const T* const logp = tokens.logp;
  const T* const old_logp = tokens.old_logp;
  const T* const weights = tokens.weight;
  const T* const later[] = {tokens.advantages, tokens.ref_logp ? tokens.ref_logp : logp,
                            tokens.entropy ? tokens.entropy : logp};
  T k1[kTokenLanes] = {};
  T k3[kTokenLanes] = {};
  T ordinary[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
    for (const T* x : later) __builtin_prefetch(x + begin);
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const bool kept = weights[t] != T(0);
      const T x = select(kept, logp[t], T(0));
      const T old = select(kept, old_logp[t], T(0));
      const T d = bounded(log_ratio(x, old), most);
      const ExpExcess<T> e = exp_excess(d);
      ratios[t] = e.exp;
      k1[i] -= d;
      k3[i] += e.excess;
      ordinary[i] += select(abs(x - old) <= most, T(1), T(0));
    }
  }
  part[PolicyStats::k1] = fold_sum(k1);
  part[PolicyStats::k3] = fold_sum(k3);
  return fold_sum(ordinary) == T(n);
}

// The same without old_logp: the ratio is 1; that of a NaN must show.
template <typename T>
bool own_ratio_pass(const PolicyTokens<T>& tokens, int64_t n, T* __restrict__ ratios,
                    double* part) {
  T excess[kTokenLanes] = {};
  T ordinary[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const T x = select(tokens.weight[t] != T(0), tokens.logp[t], T(0));
      ratios[t] = select(x != x, x, T(1));
      excess[i] += ratios[t] - T(1);
      ordinary[i] += select(x > -infinity<T>(), T(1), T(0));
    }
  }
  part[PolicyStats::k1] = part[PolicyStats::k3] = fold_sum(excess);
  return fold_sum(ordinary) == T(n);
}

// The derivatives of the ratios of a block in which some are not the ratios.
template <typename T>
void slope_pass(const PolicyTokens<T>& tokens, int64_t n, const Bounds<T>& bound,
                const T* __restrict__ ratios, T* __restrict__ slopes) {
  const T* const logp = tokens.logp;
  const T* const old_logp = tokens.old_logp ? tokens.old_logp : logp;
  const T* const weights = tokens.weight;
  for (int64_t t = 0; t < n; ++t) {
    const bool kept = weights[t] != T(0);
    const T x = select(kept, logp[t], T(0));
    const T old = select(kept, old_logp[t], T(0));
    slopes[t] = ratios[t] * held_log_ratio(x, old, bound.log_ratio).slope;
  }
}

// The ratio of each token's sequence, and its derivative.
template <typename T>
void sequence_ratio_pass(const PolicyTokens<T>& tokens, int64_t n, const Bounds<T>& bound,
                         T* __restrict__ ratios, T* __restrict__ slopes) {
  const T* const logp = tokens.logp;
  const T* const means = tokens.sequence_log_ratio;
  const T* const weights = tokens.weight;
  for (int64_t t = 0; t < n; ++t) {
    const bool kept = weights[t] != T(0);
    const T x = select(kept, logp[t], T(0));
    const T mean = select(kept, means[t], T(0));
    const Moving<T> ratio = ratio_of(held_mean(mean, x, bound));
    ratios[t] = ratio.value;
    slopes[t] = ratio.slope;
  }
}

// The ratios of tokens, with their derivatives.
template <typename T>
void make_ratios(const PolicyTokens<T>& tokens, int64_t n, const Bounds<T>& bound,
                 Ratios<T>& ratios, double* part) {
  const bool ordinary = tokens.old_logp
                            ? ratio_pass(tokens, n, bound.log_ratio.most, ratios.value, part)
                            : own_ratio_pass(tokens, n, ratios.value, part);
  if (ordinary) return;
  slope_pass(tokens, n, bound, ratios.value, ratios.held_slope);
  ratios.slope = ratios.held_slope;
}

template <typename SurrogateOf, typename T>
void surrogate_pass(const PolicyTokens<T>& tokens, int64_t n, const Bounds<T>& bound,
                    const Ratios<T>& __restrict__ ratios, T* __restrict__ coefficient,
                    double* part) {
  const T* const logp = tokens.logp;
  const T* const advantages = tokens.advantages;
  const T* const weights = tokens.weight;
  T count[kTokenLanes] = {};
  T loss[kTokenLanes] = {};
  T sum[kTokenLanes] = {};
  T sum_sq[kTokenLanes] = {};
  T least[kTokenLanes];
  T most[kTokenLanes];
  T low[kTokenLanes] = {};
  T high[kTokenLanes] = {};
  T dual[kTokenLanes] = {};
  for (int64_t i = 0; i < kTokenLanes; ++i) {
    least[i] = infinity<T>();
    most[i] = -infinity<T>();
  }
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const T w = weights[t];
      const T ratio = ratios.value[t];
      const bool kept = w != T(0);
      const T a = select(kept, advantages[t], T(0));
      const T x = select(kept, logp[t], T(0));
      const SurrogateTerm<T> term = SurrogateOf()(Moving<T>{ratio, ratios.slope[t]}, a, x, bound);
      coefficient[t] = w * term.slope;
      count[i] += select(kept, T(1), T(0));
      loss[i] += w * term.value;
      const T real = select(kept, ratio, T(0));
      sum[i] += real;
      sum_sq[i] += real * real;
      least[i] = select(kept & (ratio < least[i]), ratio, least[i]);
      most[i] = select(kept & (ratio > most[i]), ratio, most[i]);
      low[i] += term.low;
      high[i] += term.high;
      dual[i] += term.dual;
    }
  }
  part[PolicyStats::count] = fold_sum(count);
  part[PolicyStats::clipped_dual] = fold_sum(dual);
  part[PolicyStats::surrogate] = part[PolicyStats::loss] = fold_sum(loss);
  part[PolicyStats::ratio] = fold_sum(sum);
  part[PolicyStats::ratio_sq] = fold_sum(sum_sq);
  part[PolicyStats::clipped_low] = fold_sum(low);
  part[PolicyStats::clipped_high] = fold_sum(high);
  part[PolicyStats::ratio_min] = fold_min(least);
  part[PolicyStats::ratio_max] = fold_max(most);
}

template <typename KlOf, typename T>
void kl_pass(const PolicyTokens<T>& tokens, int64_t n, T kl_coef, const Bounds<T>& bound,
             T* __restrict__ coefficient, const Ratios<T>& __restrict__ ratios, double* part) {
  const T* const logp = tokens.logp;
  const T* const ref_logp = tokens.ref_logp;
  const T* const weights = tokens.weight;
  T sum[kTokenLanes] = {};
  T loss[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const T w = weights[t];
      const bool kept = w != T(0);
      const T x = select(kept, logp[t], T(0));
      const T ref = select(kept, ref_logp[t], T(0));
      const Moving<T> d = held_log_ratio(x, ref, bound.log_ratio);
      const Moving<T> term = KlOf()(d, Moving<T>{ratios.value[t], ratios.slope[t]});
      coefficient[t] += w * kl_coef * term.slope;
      sum[i] += term.value;
      loss[i] += w * kl_coef * term.value;
    }
  }
  part[PolicyStats::ref_kl] = fold_sum(sum);
  part[PolicyStats::loss] += fold_sum(loss);
}

// The gradient of the entropy is a constant times the weight: nothing to write.
template <typename T>
void entropy_pass(const PolicyTokens<T>& tokens, int64_t n, T entropy_coef, double* part) {
  const T* const entropy = tokens.entropy;
  const T* const weights = tokens.weight;
  T sum[kTokenLanes] = {};
  T loss[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const T w = weights[begin + i];
      const T h = select(w != T(0), entropy[begin + i], T(0));
      sum[i] += h;
      loss[i] += w * entropy_coef * h;
    }
  }
  part[PolicyStats::entropy] = fold_sum(sum);
  part[PolicyStats::loss] -= fold_sum(loss);
}

// n is a multiple of the lanes.
template <typename T>
void whole_block(const PolicyTokens<T>& tokens, int64_t n, const PolicyTerms& terms, T* coefficient,
                 double* part) {
  const LossOptions options = options_of(terms);
  const Bounds<T> bound = bounds<T>(options);
  Ratios<T> ratios;
  Ratios<T> of_sequences;
  make_ratios(tokens, n, bound, ratios, part);
  if (tokens.sequence_log_ratio) {
    sequence_ratio_pass(tokens, n, bound, of_sequences.value, of_sequences.held_slope);
    of_sequences.slope = of_sequences.held_slope;
  }
  const auto add_surrogate = with_surrogate(
      terms.surrogate, [](auto surrogate) { return &surrogate_pass<decltype(surrogate), T>; });
  add_surrogate(tokens, n, bound, tokens.sequence_log_ratio ? of_sequences : ratios, coefficient,
                part);
  const auto add_kl = with_kl(terms.kl, [](auto kl) { return &kl_pass<decltype(kl), T>; });
  if (tokens.ref_logp) add_kl(tokens, n, T(options.kl_coef), bound, coefficient, ratios, part);
  if (tokens.entropy) entropy_pass(tokens, n, T(options.entropy_coef), part);
  part[PolicyStats::has_ref_kl] = tokens.ref_logp != nullptr;
  part[PolicyStats::has_entropy] = tokens.entropy != nullptr;
}

// A last block that ends within the lanes is padded with masked tokens: a token's bits depend
// neither on its place nor on what follows it.
template <typename T>
void policy_block(const PolicyTokens<T>& in, int64_t n, const PolicyTerms& terms, T* coefficient,
                  double* part) {
  if (n % kTokenLanes == 0) return whole_block(in, n, terms, coefficient, part);
  T copies[7][kTokenBlock];
  T padded_coefficient[kTokenBlock];
  int used = 0;
  const auto copied = [&](const T* x) { return padded(x, n, copies[used++]); };
  const PolicyTokens<T> tokens = tokens_by<T>(in, copied);
  whole_block(tokens, ceil_div(n, kTokenLanes) * kTokenLanes, terms, padded_coefficient, part);
  for (int64_t i = 0; i < n; ++i) coefficient[i] = padded_coefficient[i];
}

}  // namespace

namespace FPG_ISA {

template <>
const PolicyLossKernels<float>& table() {
  static constexpr PolicyLossKernels<float> kernels = {policy_block<float>};
  return kernels;
}
template <>
const PolicyLossKernels<double>& table() {
  static constexpr PolicyLossKernels<double> kernels = {policy_block<double>};
  return kernels;
}

}  // namespace FPG_ISA
}  // namespace fpg
