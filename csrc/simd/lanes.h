// Partial results on fixed lanes, folded in one order whatever the instruction set. Templates in an
// unnamed namespace: each instruction set keeps its own.
#pragma once

#include "common.h"

namespace fpg {
namespace {

constexpr int64_t kTokenLanes = 16;  // of the loops over tokens: their dozen sums stay in registers

// All fold the lanes as a binary tree.
template <int64_t kLanes, typename T>
T fold_sum(T (&lanes)[kLanes]) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <int64_t kLanes, typename T>
T fold_max(T (&lanes)[kLanes]) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] = larger(lanes[i], lanes[i + width]);
  return lanes[0];
}

template <int64_t kLanes, typename T>
T fold_min(T (&lanes)[kLanes]) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] = smaller(lanes[i], lanes[i + width]);
  return lanes[0];
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
