// Importance weights of a batch: blocks of tokens, or whole sequences, over the threads; their sums
// added in order.
#include "weight/importance_weights.h"

#include <vector>

#include "simd/select.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // tokens a thread should have at least

template <typename T>
ImportanceTokens<T> from(const ImportanceTokens<T>& t, int64_t i) {
  return {t.logp + i, t.behavior_logp + i, t.mask + i};
}

void add(double* total, const double* part) {
  for (int i = 0; i < kIsSums; ++i) total[i] += part[i];
  total[kIsRatioMin] = smaller(total[kIsRatioMin], part[kIsRatioMin]);
  total[kIsRatioMax] = larger(total[kIsRatioMax], part[kIsRatioMax]);
}

void clear(double* total) {
  for (int i = 0; i < kIsFields; ++i) total[i] = 0;
  total[kIsRatioMin] = infinity<double>(), total[kIsRatioMax] = -infinity<double>();
}

// The weight of a sequence from its sums in `part`, which becomes the statistics of one weight.
double weigh(double* part, IsLevel level, const ImportanceBounds& bounds) {
  const double ratio = sequence_ratio(-part[kIsK1], part[kIsTokens], level);
  const auto is = importance_weight(ratio, bounds.low, bounds.high, bounds.zero);
  part[kIsCount] = 1;
  part[kIsRatio] = part[kIsRatioMin] = part[kIsRatioMax] = ratio;
  part[kIsWeight] = is.weight, part[kIsWeightSq] = is.weight * is.weight;
  part[kIsLow] = is.below, part[kIsHigh] = is.above;
  return is.weight;
}

template <typename T>
struct Batch {
  const Sequences& sequences;
  const ImportanceTokens<T>& tokens;
  const ImportanceBounds& bounds;
  T* weight;

  // The weights of tokens [begin, end), and what was counted.
  void block(int64_t begin, int64_t end, double* part) const {
    const auto& kernel = kernels<ImportanceKernels<T>>();
    kernel.importance_block(from(tokens, begin), end - begin, bounds, weight + begin, part);
  }

  // The weights of one sequence: those that its blocks leave are overwritten.
  void sequence(int64_t s, IsLevel level, double* total) const {
    const int64_t begin = sequences.begin(s), end = sequences.end(s);
    clear(total);
    for (int64_t i = begin; i < end; i += kTokenBlock) {
      double part[kIsFields];
      block(i, smaller(i + kTokenBlock, end), part);
      add(total, part);
    }
    if (total[kIsTokens] == 0) return;
    const T w = T(weigh(total, level, bounds));
    for (int64_t i = begin; i < end; ++i) weight[i] = select(tokens.mask[i] != 0, w, T(0));
  }
};

}  // namespace

template <typename T>
void importance_weights(const Sequences& sequences, const ImportanceTokens<T>& tokens,
                        IsLevel level, const ImportanceBounds& bounds, T* weight, double* stats) {
  sequences.check("importance_weights");
  const Batch<T> batch{sequences, tokens, bounds, weight};
  const int64_t n = sequences.tokens(), blocks = ceil_div(n, kTokenBlock);
  const bool by_token = level == IsLevel::kToken;
  std::vector<double> parts((by_token ? blocks : sequences.count) * kIsFields);
  if (by_token) {
    parallel_for(blocks, kGrain / kTokenBlock, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        batch.block(i * kTokenBlock, smaller((i + 1) * kTokenBlock, n), &parts[i * kIsFields]);
    });
  } else {
    parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) batch.sequence(s, level, &parts[s * kIsFields]);
    });
  }
  clear(stats);
  for (size_t i = 0; i < parts.size(); i += kIsFields) add(stats, &parts[i]);
}

template void importance_weights(const Sequences&, const ImportanceTokens<float>&, IsLevel,
                                 const ImportanceBounds&, float*, double*);
template void importance_weights(const Sequences&, const ImportanceTokens<double>&, IsLevel,
                                 const ImportanceBounds&, double*, double*);

}  // namespace fpg
