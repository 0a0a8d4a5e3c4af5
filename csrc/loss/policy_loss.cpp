// The policy loss of a batch of tokens: blocks over the threads, their sums added in block order.
#include "loss/policy_loss.h"

#include <vector>

#include "common/sequences.h"
#include "simd/select.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 16;             // blocks a thread should have at least
constexpr int64_t kSequenceGrain = 32768;  // tokens, where sequences are the items

// In eight interleaved sums, so that the additions do not wait for one another.
template <typename T>
double mean_log_ratio(const T* logp, const T* old_logp, const T* weight, int64_t n) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {}, counts[kSums] = {};
  const auto add = [&](int64_t t, int64_t lane) {
    const bool kept = weight[t] != T(0);
    sums[lane] += select(kept, double(logp[t]) - double(old_logp[t]), 0.0);
    counts[lane] += select(kept, 1.0, 0.0);
  };
  const int64_t whole = n - n % kSums;
  for (int64_t t = 0; t < whole; t += kSums)
    for (int64_t lane = 0; lane < kSums; ++lane) add(t + lane, lane);
  for (int64_t t = whole; t < n; ++t) add(t, t - whole);
  for (int64_t i = 1; i < kSums; ++i) sums[0] += sums[i], counts[0] += counts[i];
  return log_ratio(sums[0] / larger(counts[0], 1.0), 0.0);
}

}  // namespace

template <typename T>
void policy_loss(const PolicyTokens<T>& tokens, int64_t count, const PolicyOptions& options,
                 const PolicyOut<T>& out) {
  const auto& kernel = kernels<PolicyLossKernels<T>>();
  const int64_t blocks = ceil_div(count, kTokenBlock);
  std::vector<PolicyStats> parts(blocks);
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTokenBlock;
      kernel.policy_block(from(tokens, first), smaller(kTokenBlock, count - first), options,
                          out.coefficient + first, parts[i].x);
    }
  });
  clear(*out.stats);
  for (const PolicyStats& part : parts) merge(*out.stats, part);
  show_nan(*out.stats);
  *out.loss = T(out.stats->x[kLoss]);
}

template <typename T>
void policy_loss_sequence_ratio(const Sequences& sequences, const T* logp, const T* old_logp,
                                const T* weight, T* ratio) {
  sequences.check("policy_loss");
  parallel_for(sequences, kSequenceGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = sequences.begin(i), end = sequences.end(i);
      const double d = mean_log_ratio(logp + begin, old_logp + begin, weight + begin, end - begin);
      const T value = T(exp(d));
      for (int64_t t = begin; t < end; ++t) ratio[t] = select(weight[t] != T(0), value, T(0));
    }
  });
}

template void policy_loss(const PolicyTokens<float>&, int64_t, const PolicyOptions&,
                          const PolicyOut<float>&);
template void policy_loss(const PolicyTokens<double>&, int64_t, const PolicyOptions&,
                          const PolicyOut<double>&);
template void policy_loss_sequence_ratio(const Sequences&, const float*, const float*, const float*,
                                         float*);
template void policy_loss_sequence_ratio(const Sequences&, const double*, const double*,
                                         const double*, double*);

}  // namespace fpg
