// Masked whitening: blocks of a fixed size in parallel, merged from left to right.
#include "credit/whiten.h"

#include <numeric>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"

namespace fpg {
namespace {

constexpr int64_t kBlock = 4096;  // elements; a block stays in the first cache while read twice
constexpr int64_t kGrain = 8;     // blocks a thread should have at least

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

// block(begin, end) for every block of [0, n), in order of their index.
template <typename Part, typename Block>
std::vector<Part> by_blocks(int64_t n, const Block& block) {
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
  for (const Moments& part : by_blocks<Moments>(n, block)) all = merge(all, part);
  return all;
}

struct GradientSums {
  double grad, grad_x;  // sums of grad and of grad * (x - mean)
};

template <typename X>
GradientSums gradient_sums(int64_t n, const X* grad, const X* x, const bool* mask, double mean) {
  const auto block = [&](int64_t begin, int64_t end) -> GradientSums {
    return {sum(begin, end, [&](int64_t i) { return mask[i] ? double(grad[i]) : 0.0; }),
            sum(begin, end, [&](int64_t i) { return mask[i] ? grad[i] * (x[i] - mean) : 0.0; })};
  };
  GradientSums all{0, 0};
  for (const GradientSums& part : by_blocks<GradientSums>(n, block))
    all = {all.grad + part.grad, all.grad_x + part.grad_x};
  return all;
}

}  // namespace

void whiten_moments(int64_t n, int dtype, const void* x, const bool* mask, Moments* out) {
  with_compute_dtype(dtype, [&](auto element) {
    *out = moments(n, static_cast<const decltype(element)*>(x), mask);
  });
}

void whiten(int64_t n, int dtype, const void* x_, const bool* mask, const Moments& all, bool center,
            double eps, void* out) {
  const double scale = whiten_scale(all, eps), shift = center ? 0 : all.mean, mean = all.mean;
  with_compute_dtype(dtype, [&](auto element) {
    using X = decltype(element);
    const X* x = static_cast<const X*>(x_);
    X* y = static_cast<X*>(out);
    parallel_for(n, kGrain * kBlock, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        y[i] = mask[i] ? X(whiten(double(x[i]), mean, scale, shift)) : X(0);
    });
  });
}

void whiten_backward(int64_t n, int dtype, const void* grad_, const void* x_, const bool* mask,
                     const Moments& all, bool center, double eps, void* out) {
  with_compute_dtype(dtype, [&](auto element) {
    using X = decltype(element);
    const X *x = static_cast<const X*>(x_), *grad = static_cast<const X*>(grad_);
    X* dx = static_cast<X*>(out);
    const auto [sum_grad, sum_grad_x] = gradient_sums(n, grad, x, mask, all.mean);
    const WhitenGradient g =
        whiten_gradient(all, whiten_scale(all, eps), center, sum_grad, sum_grad_x);
    const double mean = all.mean;
    parallel_for(n, kGrain * kBlock, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        dx[i] = mask[i] ? X(g.scale * grad[i] + g.offset + g.slope * (x[i] - mean)) : X(0);
    });
  });
}

}  // namespace fpg
