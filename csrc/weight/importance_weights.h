// Floor 1: importance weights of tokens and of sequences, and what the page
// fastpg/ops/importance_weights.py hands over.
#pragma once

#include "common/elementary.h"
#include "common/sequences.h"

namespace fpg {

enum class IsLevel : int { kToken, kSequence, kGeometric };  // the codes of the page

// The statistics, in the order of ImportanceStats.FIELDS: sums over tokens; sums over what has a
// weight of its own, a token or a sequence; a minimum; a maximum.
enum ImportanceField {
  kIsTokens,
  kIsK1,
  kIsK3,
  kIsCount,
  kIsRatio,
  kIsWeight,
  kIsWeightSq,
  kIsLow,
  kIsHigh,
  kIsSums,
  kIsRatioMin = kIsSums,
  kIsRatioMax,
  kIsFields
};

template <typename T>
struct ImportanceTokens {
  const T *logp, *behavior_logp;
  const uint8_t* mask;  // 0 or 1: GCC does not vectorise loads of bool
};

struct ImportanceBounds {
  double low, high;  // of the ratio; infinite: none
  bool zero;         // a ratio outside of them becomes 0, else the bound
};

// below, above: 1 where the ratio is out of its bounds. NaN is neither.
template <typename T>
struct ImportanceWeight {
  T weight, below, above;
};

template <typename T>
FPG_HD ImportanceWeight<T> importance_weight(T ratio, T low, T high, bool zero) {
  const T at_low = zero ? T(0) : low, at_high = zero ? T(0) : high;
  const bool below = ratio<low, above = ratio> high;
  return {select(below, at_low, select(above, at_high, ratio)), select(below, T(1), T(0)),
          select(above, T(1), T(0))};
}

// Of a sequence with this many tokens and this sum of log-ratios.
FPG_HD double sequence_ratio(double sum, double count, IsLevel level) {
  return exp(bounded_log_ratio(level == IsLevel::kGeometric ? sum / count : sum));
}

// weight: one T a token; stats [kIsFields].
template <typename T>
void importance_weights(const Sequences& sequences, const ImportanceTokens<T>& tokens,
                        IsLevel level, const ImportanceBounds& bounds, T* weight, double* stats);

// The loops of importance_weights_simd.cpp, which is compiled for each instruction set.
template <typename T>
struct ImportanceKernels {
  void (*importance_block)(const ImportanceTokens<T>& tokens, int64_t n,
                           const ImportanceBounds& bounds, T* weights, double* part);
};

}  // namespace fpg
