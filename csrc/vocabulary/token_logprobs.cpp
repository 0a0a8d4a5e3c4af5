// Log-probs and entropies of labels under softmax(logits), and their gradient: rows by slices.
#include "vocabulary/token_logprobs.h"

#include <algorithm>

#include "common/bind.h"
#include "simd/select.h"
#include "vocabulary/logit_rows.h"

namespace fpg {
namespace {

template <typename X>
struct Forward : RowReduction<X, RowStats<compute_t<X>>, Forward<X>> {
  using T = compute_t<X>;
  const TokenLogprobsKernels<X>& kernel = kernels<TokenLogprobsKernels<X>>();
  const LogprobsRows<T> results;

  Forward(const TokenLogprobsInputs& rows, const LogprobsOut& out)
      : RowReduction<X, RowStats<T>, Forward<X>>(rows), results(rows, out) {}

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
    results.write(row, with_label(others, label, this->temperature(row)));
  }

  void ignore(int64_t row) const { results.ignore(row); }
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
    const T max = value(in.stats, row);
    const T log_sum = value(in.stats, this->rows.count + row);
    return row_gradient(max, log_sum, value(in.entropy, row), value(in.grad_logp, row),
                        value(in.grad_entropy, row), T(this->rows.softcap),
                        this->inv_temperature(row));
  }

  void slice(int64_t row, int64_t index) const {
    const int64_t vocab = this->rows.vocab;
    const int64_t begin = index * kSlice;
    const int64_t length = smaller(kSlice, vocab - begin);
    const int64_t label = this->rows.labels[row];
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
    Forward<X>(rows, in.out).run();
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
