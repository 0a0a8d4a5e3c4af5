// The policy loss of a batch of tokens: blocks over the threads, their sums added in block order.
#include "policy_loss.h"

#include <vector>

#include "parallel.h"
#include "simd/kernels.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 16;  // blocks a thread should have at least

template <typename T>
PolicyTokens<T> from(const PolicyTokens<T>& t, int64_t i) {
  const auto at = [i](const T* x) { return x ? x + i : nullptr; };
  return {at(t.logp),     at(t.advantages), at(t.weight),
          at(t.old_logp), at(t.ref_logp),   at(t.entropy)};
}

void add(double* total, const double* part) {
  for (int i = 0; i < kPolicySums; ++i) total[i] += part[i];
  for (int i = kPolicySums; i < kPolicyMinima; ++i) total[i] = smaller(total[i], part[i]);
  for (int i = kPolicyMinima; i < kPolicyFields; ++i) total[i] = larger(total[i], part[i]);
}

}  // namespace

template <typename T>
void policy_loss(const PolicyTokens<T>& tokens, int64_t count, const PolicyOptions& options,
                 const PolicyOut<T>& out) {
  const PolicyLossKernels<T>& kernel = kernels();
  const int64_t blocks = ceil_div(count, kTokenBlock);
  std::vector<double> parts(blocks * kPolicyFields);
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTokenBlock;
      kernel.policy_block(from(tokens, first), smaller(kTokenBlock, count - first), options,
                          out.coefficient + first, &parts[i * kPolicyFields]);
    }
  });
  for (int i = 0; i < kPolicyFields; ++i)
    out.stats[i] = i < kPolicySums     ? 0
                   : i < kPolicyMinima ? infinity<double>()
                                       : -infinity<double>();
  for (int64_t i = 0; i < blocks; ++i) add(out.stats, &parts[i * kPolicyFields]);
  *out.loss = T(out.stats[kLoss]);
}

template void policy_loss(const PolicyTokens<float>&, int64_t, const PolicyOptions&,
                          const PolicyOut<float>&);
template void policy_loss(const PolicyTokens<double>&, int64_t, const PolicyOptions&,
                          const PolicyOut<double>&);

}  // namespace fpg
