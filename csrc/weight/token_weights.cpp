// Token weights: the unmasked tokens of each sequence are counted, then the weights are written.
#include "weight/token_weights.h"

#include <numeric>
#include <vector>

#include "common/bind.h"
#include "common/parallel.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // A thread should have at least so many tokens.

// The unmasked tokens of each sequence.
std::vector<int64_t> unmasked(const Sequences& sequences, const bool* mask) {
  std::vector<int64_t> lengths(sequences.count);
  parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      lengths[s] = std::accumulate(mask + sequences.begin(s), mask + sequences.end(s), int64_t{0});
  });
  return lengths;
}

void token_weights(const TokenWeightsArguments& in) {
  const Sequences sequences = in.inputs.sequences();
  const bool* mask = in.inputs.mask;
  const Reduce reduce = in.inputs.reduce;
  sequences.check("token_weights");
  const std::vector<int64_t> lengths = unmasked(sequences, mask);
  int64_t counted = 0;
  for (const int64_t length : lengths) counted += reduce == Reduce::kToken ? length : length > 0;
  const double denom = in.inputs.denom ? *in.inputs.denom : double(counted);
  parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const float weight = token_weight(denom, double(lengths[s]), reduce);
      for (int64_t i = sequences.begin(s); i < sequences.end(s); ++i)
        in.weight[i] = mask[i] ? weight : 0.f;
    }
  });
}

FPG_BIND(token_weights, token_weights)

}  // namespace
}  // namespace fpg
