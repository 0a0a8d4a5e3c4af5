// Importance weights of a batch: blocks of tokens, or whole sequences, over the threads. Their sums
// are added in order.
#include "weight/importance_weights.h"

#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // A thread should have at least so many tokens.

template <typename T>
ImportanceTokens<T> tokens_after(const ImportanceTokens<T>& tokens, int64_t first) {
  return {tokens.logp + first, tokens.behavior_logp + first, tokens.mask + first};
}

void add(double* total, const double* part) {
  for (int i = 0; i < ImportanceStats::kSums; ++i) total[i] += part[i];
  total[ImportanceStats::ratio_min] =
      smaller(total[ImportanceStats::ratio_min], part[ImportanceStats::ratio_min]);
  total[ImportanceStats::ratio_max] =
      larger(total[ImportanceStats::ratio_max], part[ImportanceStats::ratio_max]);
}

// A NaN ratio must show: minima and maxima skip it, but the sum of positive ratios does not.
void show_nan(double* total) {
  const double sum = total[ImportanceStats::ratio];
  if (sum != sum) total[ImportanceStats::ratio_min] = total[ImportanceStats::ratio_max] = sum;
}

void clear(double* total) {
  for (int i = 0; i < ImportanceStats::kFields; ++i) total[i] = 0;
  total[ImportanceStats::ratio_min] = infinity<double>();
  total[ImportanceStats::ratio_max] = -infinity<double>();
}

// The weight of a sequence from its sums in `part`, to which the statistics of that weight are put.
double weigh(double* part, ImportanceLevel level, const ImportanceBounds& bounds) {
  const double ratio =
      sequence_ratio(-part[ImportanceStats::k1], part[ImportanceStats::tokens], level);
  const auto weighed = importance_weight(ratio, bounds.low, bounds.high, bounds.zero);
  part[ImportanceStats::count] = 1;
  part[ImportanceStats::ratio] = part[ImportanceStats::ratio_min] =
      part[ImportanceStats::ratio_max] = ratio;
  part[ImportanceStats::weight] = weighed.weight;
  part[ImportanceStats::weight_sq] = weighed.weight * weighed.weight;
  part[ImportanceStats::low] = weighed.below;
  part[ImportanceStats::high] = weighed.above;
  return weighed.weight;
}

template <typename T>
struct Batch {
  Sequences sequences;
  ImportanceTokens<T> tokens;
  ImportanceBounds bounds;
  T* weight;

  // Writes the weights of tokens [begin, end), and their statistics to `part`.
  void block(int64_t begin, int64_t end, double* part) const {
    const auto& kernel = kernels<ImportanceKernels<T>>();
    kernel.importance_block(tokens_after(tokens, begin), end - begin, bounds, weight + begin, part);
  }

  // Writes the weight of one sequence at its tokens, over what its blocks left there.
  void sequence(int64_t s, ImportanceLevel level, double* total) const {
    const int64_t begin = sequences.begin(s);
    const int64_t end = sequences.end(s);
    clear(total);
    for (int64_t i = begin; i < end; i += kTokenBlock) {
      double part[ImportanceStats::kFields];
      block(i, smaller(i + kTokenBlock, end), part);
      add(total, part);
    }
    if (total[ImportanceStats::tokens] == 0) return;
    const T w = T(weigh(total, level, bounds));
    for (int64_t i = begin; i < end; ++i) weight[i] = select(tokens.mask[i] != 0, w, T(0));
  }
};

template <typename T>
void run(const ImportanceWeightsArguments& in) {
  const Sequences sequences = in.inputs.sequences();
  const ImportanceLevel level = in.inputs.level;
  const T* logp = static_cast<const T*>(in.inputs.logp);
  const T* behavior_logp = static_cast<const T*>(in.inputs.behavior_logp);
  const Batch<T> batch{sequences,
                       {logp, behavior_logp, in.inputs.mask},
                       in.inputs.bounds(),
                       static_cast<T*>(in.weight)};
  const int64_t n = sequences.tokens();
  const int64_t blocks = ceil_div(n, kTokenBlock);
  const bool per_token = level == ImportanceLevel::kToken;
  std::vector<double> parts((per_token ? blocks : sequences.count) * ImportanceStats::kFields);
  if (per_token) {
    parallel_for(blocks, kGrain / kTokenBlock, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        batch.block(i * kTokenBlock, smaller((i + 1) * kTokenBlock, n),
                    &parts[i * ImportanceStats::kFields]);
    });
  } else {
    parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s)
        batch.sequence(s, level, &parts[s * ImportanceStats::kFields]);
    });
  }
  clear(in.stats->x);
  for (size_t i = 0; i < parts.size(); i += ImportanceStats::kFields) add(in.stats->x, &parts[i]);
  show_nan(in.stats->x);
}

void importance_weights(const ImportanceWeightsArguments& in) {
  in.inputs.sequences().check("importance_weights");
  with_compute_dtype(in.inputs.dtype, [&](auto zero) { run<decltype(zero)>(in); });
}

FPG_BIND(importance_weights, importance_weights)
FPG_BIND_STATISTICS(ImportanceStats)

}  // namespace
}  // namespace fpg
