// The value loss of one token, its statistics, and the arguments of fastpg/ops/loss/value_loss.py.
#pragma once

#include "common/fields.h"
#include "common/moments.h"
#include "common/statistics.h"
#include "common/stream.h"

namespace fpg {

// Sums, then the mean of the returns R and of the residuals R - V, each with the sum of squared
// distances from it. The names and their order are those of ValueStats.FIELDS in Python.
struct ValueStats {
  FPG_STATISTICS(count, weight, loss, clipped, return_mean, return_m2, residual_mean, residual_m2)

  static constexpr int kSums = return_mean;  // so many sums come first
};

FPG_HD void clear(ValueStats& stats) {
  for (double& x : stats.x) x = 0;
}

FPG_HD void merge(ValueStats& total, const ValueStats& part) {
  for (int mean = ValueStats::kSums; mean < ValueStats::kFields; mean += 2) {
    const Moments all = merge(Moments{total.x[ValueStats::count], total.x[mean], total.x[mean + 1]},
                              Moments{part.x[ValueStats::count], part.x[mean], part.x[mean + 1]});
    total.x[mean] = all.mean;
    total.x[mean + 1] = all.m2;
  }
  // The count is among the sums: it changes after the moments, which need the old one.
  for (int i = 0; i < ValueStats::kSums; ++i) total.x[i] += part.x[i];
}

struct ValueLossInputs {
  int dtype;           // of every array
  int64_t count;       // of tokens
  const void* values;  // [count], as all arrays
  const void* returns;
  const void* weight;      // 0 masks a token
  const void* old_values;  // null: no clipping
  double clip;

  FPG_FIELDS(dtype, count, values, returns, weight, old_values, clip)
};

struct ValueLossArguments {
  ValueLossInputs inputs;
  void* loss;         // one number
  void* coefficient;  // [count], dL/dV
  ValueStats* stats;
  Scratch<ValueStats> scratch;  // on a GPU
  Stream stream;

  FPG_FIELDS(inputs, loss, coefficient, stats, scratch, stream)
};

template <typename T>
struct ValueTokens {
  const T* values;
  const T* returns;
  const T* weight;      // 0 masks a token
  const T* old_values;  // null: no clipping
};

template <typename T>
ValueTokens<T> tokens_of(const ValueLossInputs& in) {
  return {static_cast<const T*>(in.values), static_cast<const T*>(in.returns),
          static_cast<const T*>(in.weight), static_cast<const T*>(in.old_values)};
}

// For one token: its loss, the derivative by V, and 1 where the clipped error is the larger one.
template <typename T>
struct ValueTerm {
  T value, slope, clipped;
};

template <typename T>
FPG_HD ValueTerm<T> value_term(T error) {
  return {T(0.5) * error * error, error, T(0)};
}

// Where clipping enlarges the error, V is held at old_value +- clip: no gradient.
template <typename T>
FPG_HD ValueTerm<T> value_term(T error, T value, T target, T old_value, T clip) {
  const T low = old_value - clip;
  const T high = old_value + clip;
  const T held = select(value < low, low, select(value > high, high, value)) - target;
  const bool clipped = held * held > error * error;
  const T taken = select(clipped, held, error);
  return {T(0.5) * taken * taken, select(clipped, T(0), error), select(clipped, T(1), T(0))};
}

// From the sums of d = x - origin and of d^2, with the origin near the mean.
FPG_HD Moments moments_about(double origin, double count, double sum, double sum_sq) {
  if (count == 0) return {0, 0, 0};
  const double m2 = sum_sq - sum * sum / count;
  return {count, origin + sum / count, m2 < 0 ? 0 : m2};
}

// The loops of value_loss_simd.cpp, which is compiled for each instruction set.
template <typename T>
struct ValueLossKernels {
  void (*value_block)(const ValueTokens<T>& tokens, int64_t n, T clip, T* coefficient,
                      double* part);
};

}  // namespace fpg
