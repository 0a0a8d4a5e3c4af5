// The whitened element, its gradient, and the arguments of fastpg/ops/credit/whiten.py.
#pragma once

#include "common/fields.h"
#include "common/moments.h"
#include "common/stream.h"

namespace fpg {

// 1 / sqrt(var + eps); 1 for a single value, which has no variance.
FPG_HD double whiten_scale(const Moments& all, double eps) {
  return all.count > 1 ? 1 / __builtin_sqrt(all.m2 / (all.count - 1) + eps) : 1.0;
}

// `shift` is added after scaling: 0, or the mean where it is kept.
FPG_HD double whitened(double x, double mean, double scale, double shift) {
  return (x - mean) * scale + shift;
}

// dL/dx = scale * dL/dy + offset + slope * (x - mean), from sums over all the elements.
struct WhitenGradient {
  double scale, offset, slope;
};

FPG_HD WhitenGradient whiten_gradient(const Moments& all, double scale, bool center,
                                      double sum_grad, double sum_grad_deviation) {
  if (all.count == 0) return {0, 0, 0};
  const double mean_grad = sum_grad / all.count;
  const double slope =
      all.count > 1 ? scale * scale * scale * sum_grad_deviation / (all.count - 1) : 0;
  return {scale, (center ? -scale : 1 - scale) * mean_grad, -slope};
}

struct WhitenMomentsInputs {
  int dtype;  // of x: fp32 or fp64
  int64_t count;
  const void* x;     // [count]
  const bool* mask;  // [count]

  FPG_FIELDS(dtype, count, x, mask)
};

struct WhitenMomentsArguments {
  WhitenMomentsInputs inputs;
  Moments* moments;  // fp64 [3] of Python's
  Stream stream;

  FPG_FIELDS(inputs, moments, stream)
};

struct WhitenInputs {
  int dtype;  // of x, y and their gradients: fp32 or fp64
  int64_t count;
  const void* x;           // [count]
  const bool* mask;        // [count]
  const Moments* moments;  // fp64 [3] of Python's; null, in the forward op: those of x
  bool center;
  double eps;

  FPG_FIELDS(dtype, count, x, mask, moments, center, eps)
};

struct WhitenArguments {
  WhitenInputs inputs;
  void* y;                // [count]
  Moments* moments_used;  // fp64 [3] of Python's
  Stream stream;

  FPG_FIELDS(inputs, y, moments_used, stream)
};

struct WhitenBackwardArguments {
  WhitenInputs inputs;
  const void* grad_y;  // [count]
  void* grad_x;        // [count]
  Stream stream;

  FPG_FIELDS(inputs, grad_y, grad_x, stream)
};

}  // namespace fpg
