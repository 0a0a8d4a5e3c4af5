// One slice of a vocabulary row: its statistics, and its gradient.
#include "simd/lanes.h"
#include "simd/select.h"
#include "vocabulary/online_softmax.h"

namespace fpg {
namespace {

constexpr int64_t kLanes = 64;  // four AVX-512 accumulators hide the latency of an addition

template <bool kSoftcap, typename T>
FPG_HD T capped(T x, T softcap, T inverse) {
  return kSoftcap ? softcap * tanh(x * inverse) : x;
}

// The slice as compute type, capped and padded with -inf to whole lanes, and its maximum. It is
// read in place where it needs none of that, else from the buffer c. Its label, if it has one,
// counts as -inf, but not in the sum of the logits, which is 0 unless it is asked for.
template <typename T>
struct Slice {
  const T* c;
  T max, logits;
};

// Asks for memory to be brought near before a loop gets there. The hardware's own guess stops at
// the end of a page, every few hundred cycles.
template <bool kToWrite>
FPG_HD void prefetch(const void* x, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(x) + i, kToWrite, 2);
}

// Half of the next slice, which follows in memory, is asked for while this one is loaded, the other
// half while it is summed: the memory is never idle. `begin` is the place in the slice.
template <typename X>
FPG_HD void prefetch_half(const X* half, int64_t begin) {
  prefetch<false>(half + begin / 2, kLanes * sizeof(X) / 2);
}

// kLanes logits, of which the label, if it is among them, is -inf: in place, or copied.
template <typename T>
FPG_HD const T* without_label(const T* c, int64_t label, T* copy) {
  if (uint64_t(label) >= kLanes) return c;
  for (int64_t i = 0; i < kLanes; ++i) copy[i] = c[i];
  copy[label] = -infinity<T>();
  return copy;
}

template <typename T>
T max_without_label(const T* c, int64_t n, int64_t label) {
  T top[kLanes];
  T copy[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) top[i] = -infinity<T>();
  for (int64_t begin = 0; begin < n; begin += kLanes) {
    const T* values = without_label(c + begin, label - begin, copy);
    for (int64_t i = 0; i < kLanes; ++i) top[i] = larger(top[i], values[i]);
  }
  return fold_max(top);
}

template <bool kSoftcap, bool kSums, typename X, typename T>
Slice<T> load_slice(const X* x, int64_t n, int64_t label, T softcap, T* c) {
  constexpr bool kInPlace = sizeof(X) == sizeof(T) && !kSoftcap;
  const T inverse = kSoftcap ? T(1) / softcap : T(0);
  T top[kLanes];
  T logits[kLanes] = {};
  for (int64_t i = 0; i < kLanes; ++i) top[i] = -infinity<T>();
  const bool in_place = kInPlace && n % kLanes == 0;
  int64_t done = 0;
  for (; done + kLanes <= n; done += kLanes) {
    prefetch_half(x + kSlice, done);
    for (int64_t i = 0; i < kLanes; ++i) {
      const T value = capped<kSoftcap>(T(load(x[done + i])), softcap, inverse);
      if (!in_place) c[done + i] = value;
      top[i] = larger(top[i], value);
      if (kSums) logits[i] += value;
    }
  }
  if (!in_place) {
    for (int64_t i = done; i < ceil_div(n, kLanes) * kLanes; ++i) {
      c[i] = i < n ? capped<kSoftcap>(T(load(x[i])), softcap, inverse) : -infinity<T>();
      top[i - done] = larger(top[i - done], c[i]);
      if (kSums && i < n) logits[i - done] += c[i];
    }
  }
  const T* values = in_place ? reinterpret_cast<const T*>(x) : c;
  T max = fold_max(top);
  if (uint64_t(label) < uint64_t(n)) {
    if (!(values[label] < max)) max = max_without_label(values, n, label);
    if (!in_place) c[label] = -infinity<T>();
  }
  return {values, max, kSums ? fold_sum(logits) : T(0)};
}

template <bool kEntropy, bool kSums, typename X, typename T>
RowSums<T> reduce_slice(const X* x, Slice<T> slice, int64_t n, int64_t label, T inv_temperature) {
  const T origin = finite_max(slice.max);
  const T scale = inv_temperature * T(kLog2E);
  T sum[kLanes] = {};
  T weighted[kLanes] = {};
  T squares[kLanes] = {};
  T copy[kLanes];
  for (int64_t begin = 0; begin < n; begin += kLanes) {
    prefetch_half(x + kSlice + kSlice / 2, begin);
    const T* c = without_label(slice.c + begin, label - begin, copy);
    for (int64_t i = 0; i < kLanes; ++i) {
      const T y = larger((c[i] - origin) * scale, zero_exponent<T>());
      const T e = exp2(y);
      sum[i] += e;
      if (kEntropy) weighted[i] += e * y;
      if (kSums) squares[i] += e * e;
    }
  }
  return {{slice.max, fold_sum(sum), kEntropy ? fold_sum(weighted) * T(kLn2) : T(0)},
          kSums ? fold_sum(squares) : T(0),
          slice.logits};
}

template <typename X>
RowStats<compute_t<X>> slice_stats(const X* x, int64_t n, int64_t label, compute_t<X> softcap,
                                   compute_t<X> inv_temperature, bool entropy) {
  alignas(64) compute_t<X> c[kSlice];
  const auto slice = softcap != 0 ? load_slice<true, false>(x, n, label, softcap, c)
                                  : load_slice<false, false>(x, n, label, softcap, c);
  return entropy ? reduce_slice<true, false>(x, slice, n, label, inv_temperature).others
                 : reduce_slice<false, false>(x, slice, n, label, inv_temperature).others;
}

template <typename X>
RowSums<compute_t<X>> slice_sums(const X* x, int64_t n, int64_t label, compute_t<X> softcap,
                                 compute_t<X> inv_temperature) {
  alignas(64) compute_t<X> c[kSlice];
  const auto slice = softcap != 0 ? load_slice<true, true>(x, n, label, softcap, c)
                                  : load_slice<false, true>(x, n, label, softcap, c);
  return reduce_slice<true, true>(x, slice, n, label, inv_temperature);
}

constexpr int64_t kAhead = 2048;  // logits between the gradient's loop and what it asks for

// At most kLanes of them. All are read before any is written, since dx may be x.
template <bool kSoftcap, bool kEntropy, typename X, typename T>
FPG_HD void gradient_lanes(const X* x, X* dx, int64_t n, T inverse, const RowGradient<T>& row) {
  alignas(64) T c[kLanes];
  for (int64_t i = 0; i < n; ++i) c[i] = capped<kSoftcap>(T(load(x[i])), row.softcap, inverse);
  for (int64_t i = 0; i < n; ++i) store(&dx[i], logit_gradient<kSoftcap, kEntropy>(c[i], row));
}

template <bool kSoftcap, bool kEntropy, typename X, typename T>
void gradient_loop(const X* x, X* dx, int64_t n, RowGradient<T> row) {
  const T inverse = kSoftcap ? T(1) / row.softcap : T(0);
  int64_t done = 0;
  for (; done + kLanes <= n; done += kLanes) {
    prefetch<false>(x + done + kAhead, kLanes * sizeof(X));
    prefetch<true>(dx + done + kAhead, kLanes * sizeof(X));
    gradient_lanes<kSoftcap, kEntropy>(x + done, dx + done, kLanes, inverse, row);
  }
  gradient_lanes<kSoftcap, kEntropy>(x + done, dx + done, n - done, inverse, row);
}

template <typename X>
void slice_gradient(const X* x, X* dx, int64_t n, const RowGradient<compute_t<X>>& row) {
  if (row.softcap != 0) {
    gradient_loop<true, true>(x, dx, n, row);
  } else if (row.grad_entropy != 0) {
    gradient_loop<false, true>(x, dx, n, row);
  } else {
    gradient_loop<false, false>(x, dx, n, row);
  }
}

}  // namespace

namespace FPG_ISA {

template <typename X>
constexpr TokenLogprobsKernels<X> kLoops = {slice_stats<X>, slice_sums<X>, slice_gradient<X>};

template <>
const TokenLogprobsKernels<bf16>& table() {
  return kLoops<bf16>;
}
template <>
const TokenLogprobsKernels<fp16>& table() {
  return kLoops<fp16>;
}
template <>
const TokenLogprobsKernels<float>& table() {
  return kLoops<float>;
}
template <>
const TokenLogprobsKernels<double>& table() {
  return kLoops<double>;
}

}  // namespace FPG_ISA
}  // namespace fpg
