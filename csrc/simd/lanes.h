// Partial results on fixed lanes, folded in one order whatever the instruction set. Templates in an
// unnamed namespace: each instruction set keeps its own.
#pragma once

#include "common.h"

namespace fpg {
namespace {

// Both fold the lanes as a binary tree.
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

}  // namespace
}  // namespace fpg
