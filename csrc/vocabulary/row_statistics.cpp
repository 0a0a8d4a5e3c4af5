// Log-probs and entropies of labels, and row statistics besides, from one pass over the logits.
#include "common/bind.h"
#include "simd/select.h"
#include "vocabulary/logit_rows.h"

namespace fpg {
namespace {

// The statistics are [count].
struct RowStatisticsArguments {
  TokenLogprobsInputs inputs;
  LogprobsOut out;
  void* sum_p_squared;  // in the compute type
  bool* is_top1;
  void* mean_logit;  // in the compute type
  Stream stream;

  FPG_FIELDS(inputs, out, sum_p_squared, is_top1, mean_logit, stream)
};

template <typename X>
struct Statistics : RowReduction<X, RowSums<compute_t<X>>, Statistics<X>> {
  using T = compute_t<X>;
  const TokenLogprobsKernels<X>& kernel = kernels<TokenLogprobsKernels<X>>();
  const LogprobsRows<T> results;
  T* sum_p_squares;
  T* mean_logits;
  bool* are_top1;

  explicit Statistics(const RowStatisticsArguments& in)
      : RowReduction<X, RowSums<T>, Statistics<X>>(in.inputs),
        results(in.inputs, in.out),
        sum_p_squares(static_cast<T*>(in.sum_p_squared)),
        mean_logits(static_cast<T*>(in.mean_logit)),
        are_top1(in.is_top1) {}

  RowSums<T> slice(int64_t row, int64_t index) const {
    const int64_t begin = index * kSlice;
    const int64_t length = smaller(kSlice, this->rows.vocab - begin);
    return kernel.slice_sums(this->at(row) + begin, length, this->rows.labels[row] - begin,
                             T(this->rows.softcap), this->inv_temperature(row));
  }

  void finish(int64_t row, const RowSums<T>& sums) const {
    const T label = this->capped(row, this->rows.labels[row]);
    const RowResults<T> found = with_label(sums.others, label, this->temperature(row));
    results.write(row, found);
    const T mean = sums.logits / T(this->rows.vocab) * this->inv_temperature(row);
    const bool is_nan = found.log_sum != found.log_sum;
    sum_p_squares[row] = sum_p_squared(sums, label, found, this->inv_temperature(row));
    mean_logits[row] = is_nan ? found.log_sum : mean;
    are_top1[row] = !is_nan && is_top1(row, label, sums.others.max);
  }

  // Whether the label's logit is the highest, of equal ones the first. Softcap rounds, so where it
  // leaves no clear distance, the logits before it decide.
  bool is_top1(int64_t row, T label, T others) const {
    const T unclear = T(this->rows.softcap) * T(1e-5);
    if (label == -infinity<T>() || label < others - unclear) return false;
    if (label > others + unclear) return true;
    const X* x = this->at(row);
    const int64_t place = this->rows.labels[row];
    const T y = load(x[place]);
    for (int64_t j = 0; j < this->rows.vocab; ++j)
      if (load(x[j]) > y || (j < place && load(x[j]) == y)) return false;
    return true;
  }

  void ignore(int64_t row) const {
    results.ignore(row);
    sum_p_squares[row] = mean_logits[row] = T(0);
    are_top1[row] = false;
  }
};

void token_logprobs_statistics(const RowStatisticsArguments& in) {
  with_float_dtype(in.inputs.dtype, [&](auto x) { Statistics<decltype(x)>(in).run(); });
}

FPG_BIND(token_logprobs_statistics, token_logprobs_statistics)

}  // namespace
}  // namespace fpg
