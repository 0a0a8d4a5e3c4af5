// Masked whitening: blocks of a fixed size in parallel, merged from left to right.
#include "credit/whiten.h"

#include <numeric>
#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace fpg {
namespace {

constexpr int64_t kBlock = 4096;  // A block stays in the first cache while it is read twice.
constexpr int64_t kGrain = 8;     // A thread should have at least so many blocks.

// The sum of term(i) over [begin, end), as eight interleaved sums that are added in a fixed order.
template <typename Term>
double sum(int64_t begin, int64_t end, const Term& term) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  for (; i < end; ++i) lanes[0] += term(i);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// What block(begin, end) returns for every block of [0, n), in their order.
template <typename Part, typename Block>
std::vector<Part> block_parts(int64_t n, const Block& block) {
  std::vector<Part> parts(ceil_div(n, kBlock));
  parallel_for(parts.size(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[i] = block(i * kBlock, smaller((i + 1) * kBlock, n));
  });
  return parts;
}

template <typename X>
Moments moments(int64_t n, const X* x, const bool* mask) {
  const auto block = [&](int64_t begin, int64_t end) -> Moments {
    const auto count = double(std::accumulate(mask + begin, mask + end, int64_t{0}));
    if (count == 0) return {0, 0, 0};
    const double mean =
        sum(begin, end, [&](int64_t i) { return mask[i] ? double(x[i]) : 0.0; }) / count;
    const double squares = sum(begin, end, [&](int64_t i) {
      const double d = mask[i] ? x[i] - mean : 0.0;
      return d * d;
    });
    return {count, mean, squares};
  };
  Moments all{0, 0, 0};
  for (const Moments& part : block_parts<Moments>(n, block)) all = merge(all, part);
  return all;
}

struct GradientSums {
  double grad, grad_deviation;  // the sums of dL/dy and of dL/dy (x - mean)
};

template <typename X>
GradientSums gradient_sums(int64_t n, const X* grad, const X* x, const bool* mask, double mean) {
  const auto block = [&](int64_t begin, int64_t end) -> GradientSums {
    return {sum(begin, end, [&](int64_t i) { return mask[i] ? double(grad[i]) : 0.0; }),
            sum(begin, end, [&](int64_t i) { return mask[i] ? grad[i] * (x[i] - mean) : 0.0; })};
  };
  GradientSums all{0, 0};
  for (const GradientSums& part : block_parts<GradientSums>(n, block))
    all = {all.grad + part.grad, all.grad_deviation + part.grad_deviation};
  return all;
}

void whiten_moments(const WhitenMomentsArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    *in.moments = moments(in.inputs.count, static_cast<const T*>(in.inputs.x), in.inputs.mask);
  });
}

void whiten(const WhitenArguments& in) {
  const int64_t count = in.inputs.count;
  const bool* mask = in.inputs.mask;
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(in.inputs.x);
    T* y = static_cast<T*>(in.y);
    const Moments all = in.inputs.moments ? *in.inputs.moments : moments(count, x, mask);
    *in.moments_used = all;
    const double scale = whiten_scale(all, in.inputs.eps);
    const double mean = all.mean;
    const double shift = in.inputs.center ? 0 : all.mean;
    parallel_for(count, kGrain * kBlock, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        y[i] = mask[i] ? T(whitened(double(x[i]), mean, scale, shift)) : T(0);
    });
  });
}

void whiten_backward(const WhitenBackwardArguments& in) {
  const int64_t count = in.inputs.count;
  const Moments all = *in.inputs.moments;
  const bool* mask = in.inputs.mask;
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(in.inputs.x);
    const T* grad_y = static_cast<const T*>(in.grad_y);
    T* grad_x = static_cast<T*>(in.grad_x);
    const GradientSums sums = gradient_sums(count, grad_y, x, mask, all.mean);
    const double scale = whiten_scale(all, in.inputs.eps);
    const double mean = all.mean;
    const WhitenGradient g =
        whiten_gradient(all, scale, in.inputs.center, sums.grad, sums.grad_deviation);
    parallel_for(count, kGrain * kBlock, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        grad_x[i] = mask[i] ? T(g.scale * grad_y[i] + g.offset + g.slope * (x[i] - mean)) : T(0);
    });
  });
}

FPG_BIND(whiten_moments, whiten_moments)
FPG_BIND(whiten, whiten)
FPG_BIND(whiten_backward, whiten_backward)

}  // namespace
}  // namespace fpg
