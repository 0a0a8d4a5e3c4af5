// One block of tokens of the policy loss: a pass over the first-level cache for the ratios and one
// for each summand of the loss, so that no option multiplies the loops of another.
#include "common/parallel.h"
#include "loss/policy_loss.h"
#include "simd/lanes.h"
#include "simd/select.h"

namespace fpg {
namespace {

// The ratio of each token, 1 at masked ones. This pass computes more than it reads: what the passes
// after it read comes from memory meanwhile.
template <typename T>
void ratio_pass(const PolicyTokens<T>& tokens, int64_t n, T* __restrict__ ratios, double* part) {
  const T *const logp = tokens.logp, *const old_logp = tokens.old_logp;
  const T* const weights = tokens.weight;
  const T* const later[] = {tokens.advantages, tokens.ref_logp ? tokens.ref_logp : logp,
                            tokens.entropy ? tokens.entropy : logp};
  T k1[kTokenLanes] = {}, k3[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
    for (const T* x : later) __builtin_prefetch(x + begin);
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const bool kept = weights[t] != T(0);
      const T d = log_ratio(select(kept, logp[t], T(0)), select(kept, old_logp[t], T(0)));
      const ExpExcess<T> e = exp_excess(d);
      ratios[t] = e.exp;
      k1[i] -= d;
      k3[i] += e.excess;
    }
  }
  part[kK1] = fold_sum(k1), part[kK3] = fold_sum(k3);
}

template <Surrogate kKind, typename T>
void surrogate_pass(const PolicyTokens<T>& tokens, int64_t n, const PolicyNumbers& numbers,
                    const T* __restrict__ ratios, T* __restrict__ coefficient, double* part) {
  const T *const logp = tokens.logp, *const advantages = tokens.advantages;
  const T* const weights = tokens.weight;
  const Bounds<T> bound = bounds<T>(numbers);
  T count[kTokenLanes] = {}, weight[kTokenLanes] = {}, loss[kTokenLanes] = {};
  T sum[kTokenLanes] = {}, sum_sq[kTokenLanes] = {}, least[kTokenLanes], most[kTokenLanes];
  T low[kTokenLanes] = {}, high[kTokenLanes] = {};
  for (int64_t i = 0; i < kTokenLanes; ++i) least[i] = infinity<T>(), most[i] = -infinity<T>();
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const T w = weights[t], ratio = ratios[t];
      const bool kept = w != T(0);
      const T a = select(kept, advantages[t], T(0)), x = select(kept, logp[t], T(0));
      const SurrogateTerm<T> term = surrogate<kKind>(ratio, a, x, bound);
      coefficient[t] = w * term.slope;
      count[i] += select(kept, T(1), T(0));
      weight[i] += w;
      loss[i] += w * term.value;
      const T real = select(kept, ratio, T(0));
      sum[i] += real;
      sum_sq[i] += real * real;
      least[i] = select(kept & (ratio < least[i]), ratio, least[i]);
      most[i] = select(kept & (ratio > most[i]), ratio, most[i]);
      low[i] += term.low;
      high[i] += term.high;
    }
  }
  part[kCount] = fold_sum(count), part[kWeight] = fold_sum(weight);
  part[kSurrogate] = part[kLoss] = fold_sum(loss);
  part[kRatio] = fold_sum(sum), part[kRatioSq] = fold_sum(sum_sq);
  part[kClippedLow] = fold_sum(low), part[kClippedHigh] = fold_sum(high);
  part[kRatioMin] = fold_min(least), part[kRatioMax] = fold_max(most);
}

template <PolicyKl kKind, typename T>
void kl_pass(const PolicyTokens<T>& tokens, int64_t n, T kl_coef, T* __restrict__ coefficient,
             const T* __restrict__ ratios, double* part) {
  const T *const logp = tokens.logp, *const ref_logp = tokens.ref_logp;
  const T* const weights = tokens.weight;
  T sum[kTokenLanes] = {}, loss[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const int64_t t = begin + i;
      const T w = weights[t];
      const bool kept = w != T(0);
      const T d = log_ratio(select(kept, logp[t], T(0)), select(kept, ref_logp[t], T(0)));
      const LossTerm<T> term = reference_kl<kKind>(d, ratios[t]);
      coefficient[t] += w * kl_coef * term.slope;
      sum[i] += term.value;
      loss[i] += w * kl_coef * term.value;
    }
  }
  part[kRefKl] = fold_sum(sum);
  part[kLoss] += fold_sum(loss);
}

// The gradient of the entropy is a constant times the weight: nothing to write.
template <typename T>
void entropy_pass(const PolicyTokens<T>& tokens, int64_t n, T entropy_coef, double* part) {
  const T *const entropy = tokens.entropy, *const weights = tokens.weight;
  T sum[kTokenLanes] = {}, loss[kTokenLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTokenLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTokenLanes; ++i) {
      const T w = weights[begin + i];
      const T h = select(w != T(0), entropy[begin + i], T(0));
      sum[i] += h;
      loss[i] += w * entropy_coef * h;
    }
  }
  part[kEntropy] = fold_sum(sum);
  part[kLoss] -= fold_sum(loss);
}

template <typename T>
auto surrogate_pass_of(Surrogate kind) {
  switch (kind) {
    case Surrogate::kPpo:
      return surrogate_pass<Surrogate::kPpo, T>;
    case Surrogate::kReinforce:
      return surrogate_pass<Surrogate::kReinforce, T>;
    case Surrogate::kCispo:
      return surrogate_pass<Surrogate::kCispo, T>;
    default:
      return surrogate_pass<Surrogate::kSapo, T>;
  }
}

template <typename T>
auto kl_pass_of(PolicyKl kind) {
  switch (kind) {
    case PolicyKl::kK3:
      return kl_pass<PolicyKl::kK3, T>;
    case PolicyKl::kK3Naive:
      return kl_pass<PolicyKl::kK3Naive, T>;
    default:
      return kl_pass<PolicyKl::kK2, T>;
  }
}

// n is a multiple of the lanes.
template <typename T>
void whole_block(const PolicyTokens<T>& tokens, int64_t n, const PolicyOptions& options,
                 T* coefficient, double* part) {
  const PolicyNumbers numbers = numbers_of(options);
  alignas(64) T ratios[kTokenBlock];
  if (tokens.old_logp)
    ratio_pass(tokens, n, ratios, part);
  else
    for (int64_t i = 0; i < n; ++i) ratios[i] = T(1);
  surrogate_pass_of<T>(options.surrogate)(tokens, n, numbers, tokens.ratio ? tokens.ratio : ratios,
                                          coefficient, part);
  if (tokens.ref_logp)
    kl_pass_of<T>(options.kl)(tokens, n, T(numbers.kl_coef), coefficient, ratios, part);
  if (tokens.entropy) entropy_pass(tokens, n, T(numbers.entropy_coef), part);
  part[kHasRefKl] = tokens.ref_logp != nullptr;
  part[kHasEntropy] = tokens.entropy != nullptr;
}

// A last block that ends within the lanes is padded with masked tokens: a token's bits depend
// neither on its place nor on what follows it.
template <typename T>
void policy_block(const PolicyTokens<T>& in, int64_t n, const PolicyOptions& options,
                  T* coefficient, double* part) {
  if (n % kTokenLanes == 0) return whole_block(in, n, options, coefficient, part);
  T copy[8][kTokenBlock];
  const PolicyTokens<T> tokens = {
      padded(in.logp, n, copy[0]),    padded(in.advantages, n, copy[1]),
      padded(in.weight, n, copy[2]),  padded(in.old_logp, n, copy[3]),
      padded(in.ratio, n, copy[4]),   padded(in.ref_logp, n, copy[5]),
      padded(in.entropy, n, copy[6]),
  };
  whole_block(tokens, ceil_div(n, kTokenLanes) * kTokenLanes, options, copy[7], part);
  for (int64_t i = 0; i < n; ++i) coefficient[i] = copy[7][i];
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
