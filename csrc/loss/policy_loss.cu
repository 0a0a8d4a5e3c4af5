// The policy loss of a batch of tokens, four to a thread, in one launch; and before it, where the
// level is the sequence, the ratios, with a block for each sequence.
#include "common/bind.h"
#include "common/cuda_reduce.h"
#include "common/dtype.h"
#include "common/sequences.h"
#include "loss/policy_loss.h"

namespace fpg {
namespace {

// Adds up the surrogate of a token, given e^d and e^d - 1 - d, and returns its slope.
template <typename T>
__device__ T add_surrogate(T w, T d, const ExpExcess<T>& e, T ratio, const SurrogateTerm<T>& term,
                           PolicyStats& stats) {
  stats.x[PolicyStats::count] += 1;
  stats.x[PolicyStats::loss] += w * term.value;
  stats.x[PolicyStats::surrogate] += w * term.value;
  stats.x[PolicyStats::ratio] += ratio;
  stats.x[PolicyStats::ratio_sq] += ratio * ratio;
  stats.x[PolicyStats::k1] -= d;
  stats.x[PolicyStats::k3] += e.excess;
  stats.x[PolicyStats::clipped_low] += term.low;
  stats.x[PolicyStats::clipped_high] += term.high;
  stats.x[PolicyStats::clipped_dual] += term.dual;
  stats.x[PolicyStats::ratio_min] = smaller(stats.x[PolicyStats::ratio_min], double(ratio));
  stats.x[PolicyStats::ratio_max] = larger(stats.x[PolicyStats::ratio_max], double(ratio));
  return term.slope;
}

// Four tokens: writes their coefficients and adds them up.
template <typename T>
__device__ void policy_four(const PolicyTokens<T>& in, int64_t first, int64_t left,
                            const PolicyTerms& terms, T* coefficient, PolicyStats& stats) {
  const LossOptions options = options_of(terms);
  const Bounds<T> bound = bounds<T>(options);
  const T kl_coef = T(options.kl_coef);
  const T entropy_coef = T(options.entropy_coef);
  const auto four = [&](const T* x) { return load_four(x ? x + first : x, left, T(0)); };
  const Four<T> weight = four(in.weight);
  const Four<T> logp = four(in.logp);
  const Four<T> advantages = four(in.advantages);
  const Four<T> old_logp = four(in.old_logp);
  const Four<T> means = four(in.sequence_log_ratio);
  const Four<T> ref_logp = four(in.ref_logp);
  const Four<T> entropy = four(in.entropy);
  Four<T> slopes = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T w = weight.x[i];
    const T x = logp.x[i];
    if (w == T(0)) continue;
    // Without old_logp it is logp itself, whose ratio is 1; that of a NaN shows.
    const Moving<T> d = held_log_ratio(x, in.old_logp ? old_logp.x[i] : x, bound.log_ratio);
    const ExpExcess<T> e = exp_excess(d.value);
    const Moving<T> token_ratio = {e.exp, e.exp * d.slope};
    Moving<T> ratio = token_ratio;
    if (in.sequence_log_ratio) ratio = ratio_of(held_mean(means.x[i], x, bound));
    // The terms are the same for all threads: a branch costs less than a kernel for each of them.
    const SurrogateTerm<T> term = with_surrogate(terms.surrogate, [&](auto surrogate) {
      return surrogate(ratio, advantages.x[i], x, bound);
    });
    slopes.x[i] = w * add_surrogate(w, d.value, e, ratio.value, term, stats);
    if (in.ref_logp) {
      const Moving<T> d_ref = held_log_ratio(x, ref_logp.x[i], bound.log_ratio);
      const Moving<T> kl = with_kl(terms.kl, [&](auto kl) { return kl(d_ref, token_ratio); });
      slopes.x[i] += w * kl_coef * kl.slope;
      stats.x[PolicyStats::loss] += w * kl_coef * kl.value;
      stats.x[PolicyStats::ref_kl] += kl.value;
    }
    stats.x[PolicyStats::loss] -= w * entropy_coef * entropy.x[i];
    stats.x[PolicyStats::entropy] += entropy.x[i];
  }
  store_four(coefficient + first, left, slopes);
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    policy_loss_kernel(PolicyTokens<T> tokens, int64_t count, PolicyTerms terms, PolicyOut<T> out,
                       Scratch<PolicyStats> scratch) {
  const int64_t first = (int64_t(blockIdx.x) * kReduceThreads + threadIdx.x) * 4;
  PolicyStats stats;
  clear(stats);
  policy_four(tokens, first, count - first, terms, out.coefficient, stats);
  stats.x[PolicyStats::has_ref_kl] = tokens.ref_logp != nullptr;
  stats.x[PolicyStats::has_entropy] = tokens.entropy != nullptr;
  if (!store_part(block_reduce(stats), scratch)) return;
  stats = merge_parts(scratch);
  if (threadIdx.x != 0) return;
  show_nan(stats);
  *out.stats = stats;
  *out.loss = T(stats.x[PolicyStats::loss]);
}

// Threads take turns from the sequence's first token, so that no bit depends on the batch.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    sequence_log_ratio_kernel(Sequences sequences, const T* logp, const T* old_logp,
                              const T* weight, T* mean) {
  const Sequence sequence = sequence_at(sequences, blockIdx.x);
  const int64_t begin = sequence.begin + threadIdx.x;
  const int64_t end = sequence.end;
  Sums<2> own = {};
  for (int64_t t = begin; t < end; t += kReduceThreads) {
    const bool kept = weight[t] != T(0);
    own.x[0] += select(kept, summand(logp[t], old_logp[t]), 0.0);
    own.x[1] += kept;
  }
  const Sums<2>& sums = block_reduce(own);
  const T value = T(sums.x[0] / larger(sums.x[1], 1.0));
  for (int64_t t = begin; t < end; t += kReduceThreads)
    mean[t] = select(weight[t] != T(0), value, T(0));
}

void policy_loss(const PolicyLossArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const PolicyOut<T> out = {static_cast<T*>(in.loss), static_cast<T*>(in.coefficient), in.stats};
    launch_reduce(policy_loss_kernel<T>, in.inputs.count, in.scratch, in.stream,
                  tokens_of<T>(in.inputs), in.inputs.count, in.inputs.terms, out);
  });
}

void policy_loss_sequence_log_ratio(const SequenceLogRatioArguments& in) {
  with_compute_dtype(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Sequences sequences = {in.sequence_count, in.length, in.cu_seqlens};
    launch(sequence_log_ratio_kernel<T>, sequences.count, kReduceThreads, in.stream, sequences,
           static_cast<const T*>(in.logp), static_cast<const T*>(in.old_logp),
           static_cast<const T*>(in.weight), static_cast<T*>(in.log_ratio));
  });
}

FPG_BIND(policy_loss, policy_loss)
FPG_BIND(policy_loss_sequence_log_ratio, policy_loss_sequence_log_ratio)
FPG_BIND_STATISTICS(PolicyStats)

}  // namespace
}  // namespace fpg
