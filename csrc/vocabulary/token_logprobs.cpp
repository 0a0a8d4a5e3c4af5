// Log-probs and entropies of labels under softmax(logits), and their gradient: rows by slices.
#include "vocabulary/token_logprobs.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "simd/select.h"
#include "vocabulary/online_softmax.h"

namespace fpg {
namespace {

// Below this many rows the slices of a row are spread over the threads too. The bits do not change.
constexpr int64_t kFewRows = 32;
constexpr int64_t kGrain = 32768;  // logits a thread should have at least

// Temperature, label and place of each row.
template <typename X>
struct Rows {
  using T = compute_t<X>;
  const TokenLogprobsInputs& rows;

  const X* at(int64_t row) const {
    const int64_t outer = row / rows.inner, inner = row % rows.inner;
    return static_cast<const X*>(rows.logits.data) + outer * rows.outer_stride +
           inner * rows.inner_stride;
  }
  bool ignored(int64_t row) const { return rows.labels[row] == rows.ignore_index; }
  T temperature(int64_t row) const {
    return static_cast<const T*>(rows.temperature)[rows.temperature_per_row ? row : 0];
  }
  T inv_temperature(int64_t row) const { return T(1) / temperature(row); }
  T capped(int64_t row, int64_t token) const {
    const T x = load(at(row)[token]), cap = T(rows.softcap);
    return cap == T(0) ? x : cap * tanh(x * (T(1) / cap));
  }
};

// Labels and temperatures are read once before anything is computed, so that a bad one raises
// first.
template <typename X>
void check(const TokenLogprobsInputs& rows) {
  using T = compute_t<X>;
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t label = rows.labels[row];
    if (label == rows.ignore_index) continue;
    const T temperature = Rows<X>{rows}.temperature(row);
    if (label < 0 || label >= rows.vocab)
      throw std::out_of_range("token_logprobs: labels holds " + std::to_string(label) + " at row " +
                              std::to_string(row) + ", outside [0, " + std::to_string(rows.vocab) +
                              ") and not ignore_index=" + std::to_string(rows.ignore_index));
    if (!(temperature > 0 && temperature < infinity<T>()))
      throw std::invalid_argument("token_logprobs: temperature holds " +
                                  std::to_string(temperature) + " at row " + std::to_string(row) +
                                  ", must be finite and > 0");
  }
}

template <typename X>
struct Forward : Rows<X> {
  using T = compute_t<X>;
  const TokenLogprobsKernels<X>& kernel = kernels<TokenLogprobsKernels<X>>();
  T *logp, *entropies, *max, *log_sums;

  Forward(const TokenLogprobsInputs& rows, const LogprobsOut& out)
      : Rows<X>{rows},
        logp(static_cast<T*>(out.logp)),
        entropies(static_cast<T*>(out.entropy)),
        max(static_cast<T*>(out.stats)),
        log_sums(max + rows.count) {}

  // The statistics of a slice without the label.
  RowStats<T> slice(int64_t row, int64_t index) const {
    const int64_t begin = index * kSlice;
    const int64_t length = smaller(kSlice, this->rows.vocab - begin);
    return kernel.slice_stats(this->at(row) + begin, length, this->rows.labels[row] - begin,
                              T(this->rows.softcap), this->inv_temperature(row),
                              this->rows.with_entropy);
  }

  void finish(int64_t row, RowStats<T> others) const {
    const T label = this->capped(row, this->rows.labels[row]);
    const RowResults<T> found = with_label(others, label, this->temperature(row));
    max[row] = found.max;
    log_sums[row] = found.log_sum;
    logp[row] = found.logp;
    if (this->rows.with_entropy) entropies[row] = found.entropy;
  }

  void ignore(int64_t row) const {
    logp[row] = max[row] = log_sums[row] = T(0);
    if (this->rows.with_entropy) entropies[row] = T(0);
  }

  void row(int64_t i) const {
    if (this->ignored(i)) return ignore(i);
    reduce(i, [&](int64_t index) { return slice(i, index); });
  }

  // The statistics of a row from those of its slices, merged from left to right.
  template <typename Slice>
  void reduce(int64_t row, const Slice& slice_of) const {
    RowStats<T> stats = slice_of(0);
    for (int64_t i = 1; i < ceil_div(this->rows.vocab, kSlice); ++i)
      stats = merge(stats, slice_of(i), this->inv_temperature(row));
    finish(row, stats);
  }

  void by_rows() const {
    parallel_for(this->rows.count, kGrain / this->rows.vocab, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row(i);
    });
  }

  void by_slices() const {
    const int64_t slices = ceil_div(this->rows.vocab, kSlice);
    std::vector<RowStats<T>> partial(this->rows.count * slices);
    parallel_for(this->rows.count * slices, kGrain / kSlice, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (!this->ignored(i / slices)) partial[i] = slice(i / slices, i % slices);
    });
    for (int64_t row = 0; row < this->rows.count; ++row) {
      if (this->ignored(row)) {
        ignore(row);
      } else {
        reduce(row, [&](int64_t i) { return partial[row * slices + i]; });
      }
    }
  }
};

template <typename X>
struct Backward : Rows<X> {
  using T = compute_t<X>;
  const TokenLogprobsKernels<X>& kernel = kernels<TokenLogprobsKernels<X>>();
  const LogprobsGradient& in;
  X* out;

  Backward(const TokenLogprobsInputs& rows, const LogprobsGradient& in, void* out)
      : Rows<X>{rows}, in(in), out(static_cast<X*>(out)) {}

  static T value(const void* values, int64_t row) {
    return values ? static_cast<const T*>(values)[row] : T(0);
  }

  RowGradient<T> gradient(int64_t row) const {
    const T max = value(in.stats, row), log_sum = value(in.stats, this->rows.count + row);
    return row_gradient(max, log_sum, value(in.entropy, row), value(in.grad_logp, row),
                        value(in.grad_entropy, row), T(this->rows.softcap),
                        this->inv_temperature(row));
  }

  void slice(int64_t row, int64_t index) const {
    const int64_t vocab = this->rows.vocab, begin = index * kSlice;
    const int64_t length = smaller(kSlice, vocab - begin), label = this->rows.labels[row];
    X* dx = out + row * vocab + begin;
    const RowGradient<T> g = gradient(row);
    // No gradient reaches an ignored, masked or clipped token: its row is not even read.
    if (this->ignored(row) || (g.grad_logp == 0 && g.grad_entropy == 0)) {
      std::fill(dx, dx + length, X{});
      return;
    }
    const bool here = label >= begin && label < begin + length;
    const T c = here ? this->capped(row, label) : T(0);  // read first: dx may lie over x
    kernel.slice_gradient(this->at(row) + begin, dx, length, g);
    if (here)
      store(&dx[label - begin],
            g.softcap == 0 ? label_gradient<false>(c, g) : label_gradient<true>(c, g));
  }

  void row(int64_t i) const {
    for (int64_t index = 0; index < ceil_div(this->rows.vocab, kSlice); ++index) slice(i, index);
  }

  void run() const {
    const int64_t slices = ceil_div(this->rows.vocab, kSlice);
    const int64_t grain = kGrain / smaller(kSlice, this->rows.vocab);
    parallel_for(this->rows.count * slices, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) slice(i / slices, i % slices);
    });
  }
};

void token_logprobs(const TokenLogprobsArguments& in) {
  const TokenLogprobsInputs& rows = in.inputs;
  with_float_dtype(rows.dtype, [&](auto x) {
    using X = decltype(x);
    check<X>(rows);
    const Forward<X> forward(rows, in.out);
    rows.count < kFewRows ? forward.by_slices() : forward.by_rows();
  });
}

void write_gradient(const TokenLogprobsInputs& rows, const LogprobsGradient& gradient, void* out) {
  with_float_dtype(rows.dtype, [&](auto x) { Backward<decltype(x)>(rows, gradient, out).run(); });
}

void token_logprobs_backward(const TokenLogprobsBackwardArguments& in) {
  write_gradient(in.inputs, in.gradient, in.grad_logits);
}

void token_logprobs_backward_out(const TokenLogprobsBackwardOutArguments& in) {
  write_gradient(in.inputs, in.gradient, in.out);
}

FPG_BIND(token_logprobs, token_logprobs)
FPG_BIND(token_logprobs_backward, token_logprobs_backward)
FPG_BIND(token_logprobs_backward_out, token_logprobs_backward_out)

}  // namespace

void token_logprobs_and_backward(const TokenLogprobsInputs& rows, const LogprobsOut& out,
                                 const std::function<void(int64_t row)>& row_loss,
                                 const LogprobsGradient& gradient, void* grad_logits) {
  with_float_dtype(rows.dtype, [&](auto x) {
    using X = decltype(x);
    check<X>(rows);
    const Forward<X> forward(rows, out);
    const Backward<X> backward(rows, gradient, grad_logits);
    parallel_for(rows.count, kGrain / rows.vocab, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        forward.row(row);
        row_loss(row);
        backward.row(row);
      }
    });
  });
}

}  // namespace fpg
