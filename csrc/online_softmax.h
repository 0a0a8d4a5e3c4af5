// Floor 1: the softmax of one row of logits, from statistics that merge.
//
// z_j = c_j / T, with c the logits after softcap: c_j = softcap * tanh(x_j / softcap).
// A row is (max c, s = sum_j e^{z_j - z_max}, w = sum_j e^{z_j - z_max} (z_j - z_max)); two parts of
// a row merge by rescaling to the larger maximum. From these
//   logp_y  = (z_y - z_max) - log s          entropy = log s - w / s
// with no cancellation of large logits, and with -inf logits contributing exactly nothing.
#pragma once

#include "elementary.h"

namespace fpg {

template <typename T>
struct RowStats {
  T max, sum, weighted;  // weighted: sum of e^d d, for the entropy
};

// d is bounded below so that e^d d is 0, not 0 * inf, where e^d vanishes. A NaN stays.
template <typename T>
FPG_HD T bounded(T d) {
  return d < T(-1000) ? T(-1000) : d;
}

// The maximum to subtract: an all -inf row subtracts 0, else it would be NaN.
template <typename T>
FPG_HD T finite_max(T max) {
  return max == -infinity<T>() ? T(0) : max;
}

template <typename T>
FPG_HD RowStats<T> empty_stats() {
  return {-infinity<T>(), T(0), T(0)};
}

template <typename T>
FPG_HD RowStats<T> rescale(RowStats<T> a, T max, T inv_temperature) {
  const T shift = bounded((a.max - finite_max(max)) * inv_temperature);
  const T factor = exp(shift);
  return {max, factor * a.sum, factor * (a.weighted + shift * a.sum)};
}

template <typename T>
FPG_HD RowStats<T> merge(RowStats<T> a, RowStats<T> b, T inv_temperature) {
  const T max = larger(a.max, b.max);
  a = rescale(a, max, inv_temperature);
  b = rescale(b, max, inv_temperature);
  return {max, a.sum + b.sum, a.weighted + b.weighted};
}

// log sum_j e^{z_j - z_max}; 0 for a row that is all -inf, whose every log-prob is -inf.
template <typename T>
FPG_HD T log_sum(RowStats<T> row) {
  return row.sum == T(0) ? T(0) : log(row.sum);
}

template <typename T>
FPG_HD T entropy(RowStats<T> row) {
  const T value = row.sum == T(0) ? T(0) : log(row.sum) - row.weighted / row.sum;
  return value < T(0) ? T(0) : value;  // rounding must not make it negative
}

// What backward knows of a row, and the two gradients that reach it.
template <typename T>
struct RowGradient {
  T max, log_sum, entropy;       // statistics of forward
  T grad_logp, grad_entropy;     // dL/dlogp, dL/dentropy
  T softcap, inv_temperature;    // softcap 0: none
};

// log p_j of the capped logit c.
template <typename T>
FPG_HD T token_logp(T c, const RowGradient<T>& row) {
  return (c - finite_max(row.max)) * row.inv_temperature - row.log_sum;
}

// dc/dx of softcap, and dz/dc of the temperature.
template <typename T>
FPG_HD T logit_slope(T c, const RowGradient<T>& row) {
  const T t = c * (row.softcap == T(0) ? T(0) : T(1) / row.softcap);
  return row.inv_temperature * (T(1) - t * t);
}

// dL/dx_j = slope (-g_logp p_j - g_H p_j (log p_j + H)) for every token but the label.
template <typename T>
FPG_HD T logit_gradient(T c, const RowGradient<T>& row) {
  const T logp = bounded(token_logp(c, row));
  return -exp(logp) * (row.grad_logp + row.grad_entropy * (logp + row.entropy)) *
         logit_slope(c, row);
}

// At the label 1 - p_y is -expm1(logp_y), which keeps its digits as p_y -> 1.
template <typename T>
FPG_HD T label_gradient(T c, const RowGradient<T>& row) {
  if (c == -infinity<T>()) return T(0);
  const T logp = bounded(token_logp(c, row));
  const T entropy_part = row.grad_entropy * exp(logp) * (logp + row.entropy);
  return (-expm1(logp) * row.grad_logp - entropy_part) * logit_slope(c, row);
}

}  // namespace fpg
