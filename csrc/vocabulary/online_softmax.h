// The softmax of one row of logits, from statistics that merge.
//
// z_j = c_j / T, with c the logits after softcap: c_j = softcap * tanh(x_j / softcap).
// A row is (max c, s = sum_j e^{z_j - z_max}, w = sum_j e^{z_j - z_max} (z_j - z_max)); two parts
// of a row merge by rescaling to the larger maximum. From these
//   logp_y  = (z_y - z_max) - log s          entropy = log s - w / s
// with no cancellation of large logits, and with -inf logits contributing exactly nothing. The
// label joins the others last: as p_y -> 1, a sum that held its 1 would round away what the others
// add.
#pragma once

#include "common/elementary.h"

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

template <typename T>
struct RowResults {
  T max, log_sum, logp, entropy;  // log_sum: log sum_j e^{z_j - z_max}
};

// The results of a row, computed in type U from the statistics of all its tokens but the label, and
// the label's capped logit. A row that is all -inf has log_sum 0: every log-prob is -inf, and the
// entropy 0.
template <typename U, typename T>
FPG_HD RowResults<T> join_label(RowStats<T> others, T label, T temperature) {
  const U inv_temperature = U(1) / U(temperature);
  const U max = larger(others.max, label);
  const RowStats<U> rest =
      rescale<U>({others.max, others.sum, others.weighted}, max, inv_temperature);
  const U d = (U(label) - finite_max(max)) * inv_temperature;
  const U e = exp(bounded(d));
  const U sum = rest.sum + e;
  const U weighted = rest.weighted + e * bounded(d);
  const U log_sum = sum == U(0) ? U(0) : d == U(0) ? log1p(rest.sum) : log(sum);
  const U entropy = sum == U(0) ? U(0) : log_sum - weighted / sum;
  const U not_below_zero = entropy < U(0) ? U(0) : entropy;  // rounding makes it negative
  return {T(max), T(log_sum), T(d - log_sum), T(not_below_zero)};
}

// The same in fp64 where the label has the maximum: a margin of 80 between it and the others would
// be rounded by 4e-6 in fp32, and 1 - p with it.
template <typename T>
FPG_HD RowResults<T> with_label(RowStats<T> others, T label, T temperature) {
  return label >= others.max ? join_label<double>(others, label, temperature)
                             : join_label<T>(others, label, temperature);
}

// What row statistics need besides: sums that merge as well.
template <typename T>
struct RowSums {
  RowStats<T> others;  // than the label
  T squares;           // sum of e^{2d} of the others
  T logits;            // sum of c, that of the label included
};

template <typename T>
FPG_HD T rescaled_squares(const RowSums<T>& a, T max, T inv_temperature) {
  const T factor = exp(bounded((a.others.max - finite_max(max)) * inv_temperature));
  return factor * factor * a.squares;
}

template <typename T>
FPG_HD RowSums<T> merge(const RowSums<T>& a, const RowSums<T>& b, T inv_temperature) {
  const RowStats<T> others = merge(a.others, b.others, inv_temperature);
  const T squares = rescaled_squares(a, others.max, inv_temperature) +
                    rescaled_squares(b, others.max, inv_temperature);
  return {others, squares, a.logits + b.logits};
}

// sum_j p_j^2 of a row, from its sums, its label's capped logit and its results.
template <typename T>
FPG_HD T sum_p_squared(const RowSums<T>& row, T label, const RowResults<T>& found,
                       T inv_temperature) {
  const T e = exp(bounded((label - finite_max(found.max)) * inv_temperature));
  const T squares = rescaled_squares(row, found.max, inv_temperature) + e * e;
  const T sum = squares * exp(T(-2) * found.log_sum);
  return sum > T(1) ? T(1) : sum;  // rounding makes it larger
}

// What backward knows of a row, and the two gradients that reach it. In units of log2, so that a
// probability is one exp2.
template <typename T>
struct RowGradient {
  T origin, scale, log2_sum;   // log2 p_j = (c_j - origin) * scale - log2_sum
  T entropy;                   // of the row, in nats
  T grad_logp, grad_entropy;   // dL/dlogp, dL/dentropy
  T softcap, inv_temperature;  // softcap 0: none
};

template <typename T>
FPG_HD RowGradient<T> row_gradient(T max, T log_sum, T entropy, T grad_logp, T grad_entropy,
                                   T softcap, T inv_temperature) {
  return {finite_max(max),
          inv_temperature * T(kLog2E),
          log_sum * T(kLog2E),
          entropy,
          grad_logp,
          grad_entropy,
          softcap,
          inv_temperature};
}

// log2 p of the capped logit c, bounded so that p log p is 0 where p vanishes.
template <typename T>
FPG_HD T log2_prob(T c, const RowGradient<T>& row) {
  return larger((c - row.origin) * row.scale - row.log2_sum, zero_exponent<T>());
}

// dz/dx: the temperature, and the slope of softcap.
template <bool kSoftcap, typename T>
FPG_HD T logit_slope(T c, const RowGradient<T>& row) {
  const T t = kSoftcap ? c / row.softcap : T(0);
  return row.inv_temperature * (T(1) - t * t);
}

// g_H (log p + H): what the entropy adds to the gradient, per -p.
template <typename T>
FPG_HD T entropy_part(T log2_p, const RowGradient<T>& row) {
  return row.grad_entropy * (log2_p * T(kLn2) + row.entropy);
}

// dL/dx_j = slope * -p_j (g_logp + g_H (log p_j + H)) for every token but the label.
template <bool kSoftcap, bool kEntropy, typename T>
FPG_HD T logit_gradient(T c, const RowGradient<T>& row) {
  const T log2_p = log2_prob(c, row);
  const T g = kEntropy ? row.grad_logp + entropy_part(log2_p, row) : row.grad_logp;
  return exp2(log2_p) * (-g * logit_slope<kSoftcap>(c, row));
}

// At the label 1 - p_y is -expm1(log p_y), which keeps its digits as p_y -> 1.
template <bool kSoftcap, typename T>
FPG_HD T label_gradient(T c, const RowGradient<T>& row) {
  if (c == -infinity<T>()) return T(0);
  const T log2_p = log2_prob(c, row);
  const T through_logp = -expm1(log2_p * T(kLn2)) * row.grad_logp;
  return (through_logp - exp2(log2_p) * entropy_part(log2_p, row)) * logit_slope<kSoftcap>(c, row);
}

// A vocabulary row is reduced in slices of this many logits, whatever the number of rows or
// threads, so that a token's bits depend on its own row alone. A slice fits in a first-level cache,
// which its second reading hits.
constexpr int64_t kSlice = 8192;

// The loops of token_logprobs_simd.cpp, which is compiled for each instruction set.
template <typename X>
struct TokenLogprobsKernels {
  using T = compute_t<X>;
  // Of all tokens but the one at `label`, if it is in the slice.
  RowStats<T> (*slice_stats)(const X* x, int64_t n, int64_t label, T softcap, T inv_temperature,
                             bool entropy);
  // The same, with an entropy and what row statistics need besides.
  RowSums<T> (*slice_sums)(const X* x, int64_t n, int64_t label, T softcap, T inv_temperature);
  void (*slice_gradient)(const X* x, X* dx, int64_t n, const RowGradient<T>& row);
};

}  // namespace fpg
