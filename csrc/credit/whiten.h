// Floor 1: the whitened element, its gradient, and what the page fastpg/ops/whiten.py hands over.
#pragma once

#include "common/moments.h"

namespace fpg {

// 1 / sqrt(var + eps); 1 for a single value, which has no variance.
FPG_HD double whiten_scale(const Moments& all, double eps) {
  return all.count > 1 ? 1 / __builtin_sqrt(all.m2 / (all.count - 1) + eps) : 1.0;
}

// `shift` is what is added after scaling: 0, or the mean where it is kept.
FPG_HD double whiten(double x, double mean, double scale, double shift) {
  return (x - mean) * scale + shift;
}

// dL/dx = scale * grad + offset + slope * (x - mean), from sums over all the elements.
struct WhitenGradient {
  double scale, offset, slope;
};

FPG_HD WhitenGradient whiten_gradient(const Moments& all, double scale, bool center,
                                      double sum_grad, double sum_grad_x) {
  if (all.count == 0) return {0, 0, 0};
  const double mean_grad = sum_grad / all.count;
  const double slope = all.count > 1 ? scale * scale * scale * sum_grad_x / (all.count - 1) : 0;
  return {scale, (center ? -scale : 1 - scale) * mean_grad, -slope};
}

void whiten_moments(int64_t n, int dtype, const void* x, const bool* mask, Moments* out);
void whiten(int64_t n, int dtype, const void* x, const bool* mask, const Moments& all, bool center,
            double eps, void* out);
void whiten_backward(int64_t n, int dtype, const void* grad, const void* x, const bool* mask,
                     const Moments& all, bool center, double eps, void* out);

}  // namespace fpg
