// Floor 1: the value loss of one token, the moments that merge, and what the page
// fastpg/ops/value_loss.py hands over.
#pragma once

#include "common/moments.h"
#include "common/stream.h"

namespace fpg {

// The statistics, in the order of ValueStats.FIELDS: sums, then the mean of the returns R and of
// the residuals R - V, each with the sum of squared distances from it.
enum ValueField {
  kValueCount,
  kValueWeight,
  kValueLoss,
  kValueClipped,
  kValueSums,
  kReturnMean = kValueSums,
  kReturnM2,
  kResidualMean,
  kResidualM2,
  kValueFields
};

struct ValueStats {
  double x[kValueFields];
};

FPG_HD void clear(ValueStats& stats) {
  for (double& x : stats.x) x = 0;
}

FPG_HD void merge(ValueStats& total, const ValueStats& part) {
  for (int mean = kValueSums; mean < kValueFields; mean += 2) {
    const Moments all = merge(Moments{total.x[kValueCount], total.x[mean], total.x[mean + 1]},
                              Moments{part.x[kValueCount], part.x[mean], part.x[mean + 1]});
    total.x[mean] = all.mean, total.x[mean + 1] = all.m2;
  }
  for (int i = 0; i < kValueSums; ++i) total.x[i] += part.x[i];  // the count, when its means are
}

template <typename T>
struct ValueTokens {  // old_values may be null: no clipping
  const T *values, *returns, *weight, *old_values;
};

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
  const T low = old_value - clip, high = old_value + clip;
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

// loss: one T; coefficient [count] in T: dL/dV.
template <typename T>
struct ValueOut {
  T *loss, *coefficient;
  ValueStats* stats;
};

template <typename T>
void value_loss(const ValueTokens<T>& tokens, int64_t count, T clip, const ValueOut<T>& out);
template <typename T>
void value_loss(const ValueTokens<T>& tokens, int64_t count, T clip, const ValueOut<T>& out,
                const Scratch<ValueStats>& scratch, Stream stream);

}  // namespace fpg
