// The policy loss of a batch of tokens: blocks over the threads, their sums added in block order.
#include "loss/policy_loss.h"

#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/sequences.h"
#include "simd/select.h"

namespace fpg {
namespace {

// A thread should have at least so many blocks of tokens, or so many tokens of whole sequences.
constexpr int64_t kGrain = 16;
constexpr int64_t kSequenceGrain = 32768;

// In eight interleaved sums, so that the additions do not wait for one another.
template <typename T, typename Summand>
double mean_over_tokens(const T* logp, const T* old_logp, const T* weight, int64_t n,
                        const Summand& summand_of) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  double counts[kSums] = {};
  const auto add = [&](int64_t t, int64_t lane) {
    const bool kept = weight[t] != T(0);
    sums[lane] += select(kept, summand_of(logp[t], old_logp[t]), 0.0);
    counts[lane] += select(kept, 1.0, 0.0);
  };
  const int64_t whole = n - n % kSums;
  for (int64_t t = 0; t < whole; t += kSums)
    for (int64_t lane = 0; lane < kSums; ++lane) add(t + lane, lane);
  for (int64_t t = whole; t < n; ++t) add(t, t - whole);
  for (int64_t i = 1; i < kSums; ++i) {
    sums[0] += sums[i];
    counts[0] += counts[i];
  }
  return sums[0] / larger(counts[0], 1.0);
}

// The plain difference is the summand of finite log-probs: others show in the mean, and are rare.
template <typename T>
double mean_log_ratio(const T* logp, const T* old_logp, const T* weight, int64_t n) {
  const double mean = mean_over_tokens(logp, old_logp, weight, n,
                                       [](T x, T old) { return double(x) - double(old); });
  if (mean - mean == 0) return mean;
  return mean_over_tokens(logp, old_logp, weight, n, [](T x, T old) { return summand(x, old); });
}

}  // namespace

template <typename T>
void policy_loss_in_blocks(const PolicyTokens<T>& tokens, int64_t count, const PolicyTerms& terms,
                           const PolicyOut<T>& out) {
  const auto& kernel = kernels<PolicyLossKernels<T>>();
  // A block of no tokens says what else is known: which of the sums were computed.
  const int64_t blocks = larger<int64_t>(1, ceil_div(count, kTokenBlock));
  std::vector<PolicyStats> parts(blocks);
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTokenBlock;
      kernel.policy_block(tokens_from(tokens, first), smaller(kTokenBlock, count - first), terms,
                          out.coefficient + first, parts[i].x);
    }
  });
  clear(*out.stats);
  for (const PolicyStats& part : parts) merge(*out.stats, part);
  show_nan(*out.stats);
  *out.loss = T(out.stats->x[PolicyStats::loss]);
}

template void policy_loss_in_blocks(const PolicyTokens<float>&, int64_t, const PolicyTerms&,
                                    const PolicyOut<float>&);
template void policy_loss_in_blocks(const PolicyTokens<double>&, int64_t, const PolicyTerms&,
                                    const PolicyOut<double>&);

namespace {

void policy_loss(const PolicyLossArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const PolicyOut<T> out = {static_cast<T*>(in.loss), static_cast<T*>(in.coefficient), in.stats};
    policy_loss_in_blocks(tokens_of<T>(in.inputs), in.inputs.count, in.inputs.terms, out);
  });
}

void policy_loss_sequence_log_ratio(const SequenceLogRatioArguments& in) {
  const Sequences sequences = {in.sequence_count, in.length, in.cu_seqlens};
  sequences.check("policy_loss");
  with_compute_dtype(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* logp = static_cast<const T*>(in.logp);
    const T* old_logp = static_cast<const T*>(in.old_logp);
    const T* weight = static_cast<const T*>(in.weight);
    T* log_ratio = static_cast<T*>(in.log_ratio);
    parallel_for(sequences, kSequenceGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = sequences.begin(i);
        const int64_t end = sequences.end(i);
        const T d = T(mean_log_ratio(logp + begin, old_logp + begin, weight + begin, end - begin));
        for (int64_t t = begin; t < end; ++t) log_ratio[t] = select(weight[t] != T(0), d, T(0));
      }
    });
  });
}

FPG_BIND(policy_loss, policy_loss)
FPG_BIND(policy_loss_sequence_log_ratio, policy_loss_sequence_log_ratio)
FPG_BIND_STATISTICS(PolicyStats)

}  // namespace
}  // namespace fpg
