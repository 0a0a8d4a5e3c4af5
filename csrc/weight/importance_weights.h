// Importance weights of tokens and of sequences, and the arguments of
// fastpg/ops/weight/importance_weights.py.
#pragma once

#include "common/fields.h"
#include "common/log_ratio.h"
#include "common/sequences.h"
#include "common/statistics.h"
#include "common/stream.h"

namespace fpg {

// The codes of the page.
enum class ImportanceLevel : int { kToken, kSequence, kGeometric };
enum class Outside : int { kClamp, kZero };

// Sums over tokens; sums over what has a weight of its own, a token or a sequence; a minimum; a
// maximum. The names and their order are those of ImportanceStats.FIELDS in Python.
struct ImportanceStats {
  FPG_STATISTICS(tokens, k1, k3, count, ratio, weight, weight_sq, low, high, ratio_min, ratio_max)

  static constexpr int kSums = ratio_min;  // so many sums come first
};

template <typename T>
struct ImportanceTokens {
  const T* logp;
  const T* behavior_logp;
  const uint8_t* mask;  // 0 or 1: GCC does not vectorise loads of bool
};

struct ImportanceBounds {
  double low, high;  // of the ratio; infinite: none
  bool zero;         // a ratio outside of them becomes 0, else the bound
};

// `below` and `above` are 1 where the ratio is out of its bounds. NaN is neither.
template <typename T>
struct ImportanceWeight {
  T weight, below, above;
};

template <typename T>
FPG_HD ImportanceWeight<T> importance_weight(T ratio, T low, T high, bool zero) {
  const T at_low = zero ? T(0) : low;
  const T at_high = zero ? T(0) : high;
  const bool below = ratio < low;
  const bool above = ratio > high;
  return {select(below, at_low, select(above, at_high, ratio)), select(below, T(1), T(0)),
          select(above, T(1), T(0))};
}

// The ratio of a sequence with this many tokens and this sum of log-ratios.
FPG_HD double sequence_ratio(double sum, double count, ImportanceLevel level) {
  return exp(bounded(level == ImportanceLevel::kGeometric ? sum / count : sum));
}

struct ImportanceWeightsInputs {
  int dtype;  // of logp, behavior_logp and weight: fp32 or fp64
  int64_t sequence_count, length;
  const void* logp;           // [tokens]
  const void* behavior_logp;  // [tokens]
  const uint8_t* mask;        // [tokens]
  const int32_t* cu_seqlens;  // [sequences + 1]; null: padded
  ImportanceLevel level;
  double low, high;
  Outside outside;

  FPG_FIELDS(dtype, sequence_count, length, logp, behavior_logp, mask, cu_seqlens, level, low, high,
             outside)

  FPG_METHOD Sequences sequences() const { return {sequence_count, length, cu_seqlens}; }
  FPG_METHOD ImportanceBounds bounds() const { return {low, high, outside == Outside::kZero}; }
};

struct ImportanceWeightsArguments {
  ImportanceWeightsInputs inputs;
  void* weight;  // [tokens]
  ImportanceStats* stats;
  Stream stream;

  FPG_FIELDS(inputs, weight, stats, stream)
};

// The loops of importance_weights_simd.cpp, which is compiled for each instruction set.
template <typename T>
struct ImportanceKernels {
  void (*importance_block)(const ImportanceTokens<T>& tokens, int64_t n,
                           const ImportanceBounds& bounds, T* weights, double* part);
};

}  // namespace fpg
