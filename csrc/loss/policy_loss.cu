// The policy loss of a batch of tokens, four to a thread, in one launch; and before it, where the
// level is the sequence, the ratios, with a block for each sequence.
#include "common/cuda_reduce.h"
#include "common/sequences.h"
#include "loss/policy_loss.h"

namespace fpg {
namespace {

constexpr int kSequenceThreads = 256;

// The options are the same for all threads: a branch costs less than a kernel for each of them.
template <typename T>
__device__ SurrogateTerm<T> surrogate_of(Surrogate kind, T ratio, T advantage, T logp,
                                         const Bounds<T>& bounds) {
  switch (kind) {
    case Surrogate::kPpo:
      return surrogate<Surrogate::kPpo>(ratio, advantage, logp, bounds);
    case Surrogate::kReinforce:
      return surrogate<Surrogate::kReinforce>(ratio, advantage, logp, bounds);
    case Surrogate::kCispo:
      return surrogate<Surrogate::kCispo>(ratio, advantage, logp, bounds);
    default:
      return surrogate<Surrogate::kSapo>(ratio, advantage, logp, bounds);
  }
}

template <typename T>
__device__ LossTerm<T> reference_kl_of(PolicyKl kind, T d, T ratio) {
  switch (kind) {
    case PolicyKl::kK3:
      return reference_kl<PolicyKl::kK3>(d, ratio);
    case PolicyKl::kK3Naive:
      return reference_kl<PolicyKl::kK3Naive>(d, ratio);
    default:
      return reference_kl<PolicyKl::kK2>(d, ratio);
  }
}

// Adds up the surrogate of a token, given e^d and e^d - 1 - d, and returns its slope.
template <typename T>
__device__ T add_surrogate(T w, T d, const ExpExcess<T>& e, T ratio, const SurrogateTerm<T>& term,
                           PolicyStats& stats) {
  stats.x[kCount] += 1;
  stats.x[kWeight] += w;
  stats.x[kLoss] += w * term.value;
  stats.x[kSurrogate] += w * term.value;
  stats.x[kRatio] += ratio;
  stats.x[kRatioSq] += ratio * ratio;
  stats.x[kK1] -= d;
  stats.x[kK3] += e.excess;
  stats.x[kClippedLow] += term.low;
  stats.x[kClippedHigh] += term.high;
  stats.x[kRatioMin] = smaller(stats.x[kRatioMin], double(ratio));
  stats.x[kRatioMax] = larger(stats.x[kRatioMax], double(ratio));
  return term.slope;
}

// Four tokens: writes their coefficients and adds them up.
template <typename T>
__device__ void policy_four(const PolicyTokens<T>& in, int64_t first, int64_t left,
                            const PolicyOptions& options, T* coefficient, PolicyStats& stats) {
  const PolicyNumbers numbers = numbers_of(options);
  const Bounds<T> bound = bounds<T>(numbers);
  const T kl_coef = T(numbers.kl_coef), entropy_coef = T(numbers.entropy_coef);
  const auto four = [&](const T* x) { return load_four(x ? x + first : x, left, T(0)); };
  const Four<T> weight = four(in.weight), logp = four(in.logp), advantages = four(in.advantages);
  const Four<T> old_logp = four(in.old_logp), ratios = four(in.ratio);
  const Four<T> ref_logp = four(in.ref_logp), entropy = four(in.entropy);
  Four<T> slopes = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T w = weight.x[i], x = logp.x[i];
    if (w == T(0)) continue;
    const T d = in.old_logp ? log_ratio(x, old_logp.x[i]) : T(0);
    const ExpExcess<T> e = exp_excess(d);
    const T ratio = in.ratio ? ratios.x[i] : e.exp;
    const auto term = surrogate_of(options.surrogate, ratio, advantages.x[i], x, bound);
    slopes.x[i] = w * add_surrogate(w, d, e, ratio, term, stats);
    if (in.ref_logp) {
      const LossTerm<T> kl = reference_kl_of(options.kl, log_ratio(x, ref_logp.x[i]), e.exp);
      slopes.x[i] += w * kl_coef * kl.slope;
      stats.x[kLoss] += w * kl_coef * kl.value;
      stats.x[kRefKl] += kl.value;
    }
    stats.x[kLoss] -= w * entropy_coef * entropy.x[i];
    stats.x[kEntropy] += entropy.x[i];
  }
  store_four(coefficient + first, left, slopes);
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    policy_loss_kernel(PolicyTokens<T> tokens, int64_t count, PolicyOptions options,
                       PolicyOut<T> out, Scratch<PolicyStats> scratch) {
  const int64_t first = (int64_t(blockIdx.x) * kReduceThreads + threadIdx.x) * 4;
  PolicyStats stats;
  clear(stats);
  policy_four(tokens, first, count - first, options, out.coefficient, stats);
  stats.x[kHasRefKl] = tokens.ref_logp != nullptr;
  stats.x[kHasEntropy] = tokens.entropy != nullptr;
  block_reduce(stats);
  if (!grid_reduce(stats, scratch)) return;
  show_nan(stats);
  *out.stats = stats;
  *out.loss = T(stats.x[kLoss]);
}

// Threads take turns from the sequence's first token, so that no bit depends on the batch.
template <typename T>
__global__ void __launch_bounds__(kSequenceThreads)
    sequence_ratio_kernel(Sequences sequences, const T* logp, const T* old_logp, const T* weight,
                          T* ratio) {
  const Sequence sequence = sequence_at(sequences, blockIdx.x);
  const int64_t begin = sequence.begin + threadIdx.x, end = sequence.end;
  Sums<2> sums = {};
  for (int64_t t = begin; t < end; t += kSequenceThreads) {
    const bool kept = weight[t] != T(0);
    sums.x[0] += select(kept, double(logp[t]) - double(old_logp[t]), 0.0);
    sums.x[1] += kept;
  }
  block_reduce(sums);
  const T value = T(exp(log_ratio(sums.x[0] / larger(sums.x[1], 1.0), 0.0)));
  for (int64_t t = begin; t < end; t += kSequenceThreads)
    ratio[t] = select(weight[t] != T(0), value, T(0));
}

}  // namespace

template <typename T>
void policy_loss(const PolicyTokens<T>& tokens, int64_t count, const PolicyOptions& options,
                 const PolicyOut<T>& out, const Scratch<PolicyStats>& scratch, Stream stream) {
  launch_reduce(policy_loss_kernel<T>, count, scratch, stream, tokens, count, options, out);
}

template <typename T>
void policy_loss_sequence_ratio(const Sequences& sequences, const T* logp, const T* old_logp,
                                const T* weight, T* ratio, Stream stream) {
  launch(sequence_ratio_kernel<T>, sequences.count, kSequenceThreads, stream, sequences, logp,
         old_logp, weight, ratio);
}

template void policy_loss(const PolicyTokens<float>&, int64_t, const PolicyOptions&,
                          const PolicyOut<float>&, const Scratch<PolicyStats>&, Stream);
template void policy_loss(const PolicyTokens<double>&, int64_t, const PolicyOptions&,
                          const PolicyOut<double>&, const Scratch<PolicyStats>&, Stream);
template void policy_loss_sequence_ratio(const Sequences&, const float*, const float*, const float*,
                                         float*, Stream);
template void policy_loss_sequence_ratio(const Sequences&, const double*, const double*,
                                         const double*, double*, Stream);

}  // namespace fpg
