// Token weights: the unmasked tokens of each sequence are counted, then the weights are written.
#include "token_weights.h"

#include <vector>

#include "parallel.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // tokens a thread should have at least

template <typename Body>
void for_each_sequence(const Sequences& sequences, const Body& body) {
  parallel_for(sequences.count, sequences.holding(kGrain), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) body(s, sequences.begin(s), sequences.end(s));
  });
}

std::vector<int64_t> unmasked(const Sequences& sequences, const bool* mask) {
  std::vector<int64_t> lengths(sequences.count);
  for_each_sequence(sequences, [&](int64_t sequence, int64_t begin, int64_t end) {
    int64_t length = 0;
    for (int64_t i = begin; i < end; ++i) length += mask[i];
    lengths[sequence] = length;
  });
  return lengths;
}

}  // namespace

void token_weights(const Sequences& sequences, const bool* mask, const double* denom, Reduce reduce,
                   float* weights) {
  sequences.check("token_weights");
  const std::vector<int64_t> lengths = unmasked(sequences, mask);
  int64_t counted = 0;
  for (const int64_t length : lengths)
    counted += reduce == Reduce::kToken ? length : length > 0;
  const double total = denom ? *denom : double(counted);
  for_each_sequence(sequences, [&](int64_t sequence, int64_t begin, int64_t end) {
    const float weight = token_weight(total, double(lengths[sequence]), reduce);
    for (int64_t i = begin; i < end; ++i) weights[i] = mask[i] ? weight : 0.f;
  });
}

}  // namespace fpg
