// Partial results on fixed lanes, folded in one order whatever the instruction set. Templates in an
// unnamed namespace: each instruction set keeps its own.
#pragma once

#include "common/numbers.h"

namespace fpg {
namespace {

// The loops over tokens have so many lanes. GCC would unroll 16 steps and not vectorise them: such
// a loop says `#pragma GCC unroll 1`.
constexpr int64_t kTokenLanes = 16;

// Folds the lanes as a binary tree. Each width is a constant, or GCC would guard it against
// overlap.
template <int64_t kLanes, typename T, typename Combine>
FPG_HD T fold(T* lanes, const Combine& combine) {
  if constexpr (kLanes == 1) {
    return lanes[0];
  } else {
    for (int64_t i = 0; i < kLanes / 2; ++i) lanes[i] = combine(lanes[i], lanes[i + kLanes / 2]);
    return fold<kLanes / 2>(lanes, combine);
  }
}

template <int64_t kLanes, typename T>
T fold_sum(T (&lanes)[kLanes]) {
  return fold<kLanes>(lanes, [](T a, T b) { return a + b; });
}
template <int64_t kLanes, typename T>
T fold_min(T (&lanes)[kLanes]) {
  return fold<kLanes>(lanes, [](T a, T b) { return smaller(a, b); });
}
template <int64_t kLanes, typename T>
T fold_max(T (&lanes)[kLanes]) {
  return fold<kLanes>(lanes, [](T a, T b) { return larger(a, b); });
}

// Copies n values, and zeros up to whole lanes: tokens of weight 0. Null stays null.
template <typename T>
const T* padded(const T* x, int64_t n, T* copy) {
  if (x == nullptr) return nullptr;
  for (int64_t i = 0; i < n; ++i) copy[i] = x[i];
  for (int64_t i = n; i < ceil_div(n, kTokenLanes) * kTokenLanes; ++i) copy[i] = T(0);
  return copy;
}

}  // namespace
}  // namespace fpg
