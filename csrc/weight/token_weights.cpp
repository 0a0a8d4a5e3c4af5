// Token weights: the unmasked tokens of each sequence are counted, then the weights are written.
#include "weight/token_weights.h"

#include <numeric>
#include <vector>

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // tokens a thread should have at least

std::vector<int64_t> unmasked(const Sequences& sequences, const bool* mask) {
  std::vector<int64_t> lengths(sequences.count);
  parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      lengths[s] = std::accumulate(mask + sequences.begin(s), mask + sequences.end(s), int64_t{0});
  });
  return lengths;
}

}  // namespace

void token_weights(const Sequences& sequences, const bool* mask, const double* denom, Reduce reduce,
                   float* weights) {
  sequences.check("token_weights");
  const std::vector<int64_t> lengths = unmasked(sequences, mask);
  int64_t counted = 0;
  for (const int64_t length : lengths) counted += reduce == Reduce::kToken ? length : length > 0;
  const double total = denom ? *denom : double(counted);
  parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const float weight = token_weight(total, double(lengths[s]), reduce);
      for (int64_t i = sequences.begin(s); i < sequences.end(s); ++i)
        weights[i] = mask[i] ? weight : 0.f;
    }
  });
}

}  // namespace fpg
