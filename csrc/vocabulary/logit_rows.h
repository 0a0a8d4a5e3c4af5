// Rows of logits on a CPU: where they lie, what is asked of their labels, and how they are reduced.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"
#include "vocabulary/online_softmax.h"
#include "vocabulary/token_logprobs.h"

namespace fpg {

// Below this many rows the slices of a row are spread over the threads too. The bits do not change.
constexpr int64_t kFewRows = 32;
constexpr int64_t kGrain = 32768;  // logits a thread should have at least

// Temperature, label and place of each row.
template <typename X>
struct Rows {
  using T = compute_t<X>;
  const TokenLogprobsInputs& rows;

  const X* at(int64_t row) const {
    const int64_t outer = row / rows.inner;
    const int64_t inner = row % rows.inner;
    return static_cast<const X*>(rows.logits.data) + outer * rows.outer_stride +
           inner * rows.inner_stride;
  }
  bool ignored(int64_t row) const { return rows.labels[row] == rows.ignore_index; }
  T temperature(int64_t row) const {
    return static_cast<const T*>(rows.temperature)[rows.temperature_per_row ? row : 0];
  }
  T inv_temperature(int64_t row) const { return T(1) / temperature(row); }
  T capped(int64_t row, int64_t token) const {
    const T x = load(at(row)[token]);
    const T cap = T(rows.softcap);
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
    // Logits are multiplied by its inverse.
    if (!(temperature > 0 && temperature < infinity<T>() && T(1) / temperature < infinity<T>())) {
      std::ostringstream message;
      message << "token_logprobs: temperature holds " << temperature << " at row " << row
              << ", it and its inverse must be finite and > 0";
      throw std::invalid_argument(message.str());
    }
  }
}

// Where the results of each row go.
template <typename T>
struct LogprobsRows {
  T* logp;
  T* entropies;
  T* max;
  T* log_sums;
  bool with_entropy;

  LogprobsRows(const TokenLogprobsInputs& rows, const LogprobsOut& out)
      : logp(static_cast<T*>(out.logp)),
        entropies(static_cast<T*>(out.entropy)),
        max(static_cast<T*>(out.stats)),
        log_sums(max + rows.count),
        with_entropy(rows.with_entropy) {}

  void write(int64_t row, const RowResults<T>& found) const {
    max[row] = found.max;
    log_sums[row] = found.log_sum;
    logp[row] = found.logp;
    if (with_entropy) entropies[row] = found.entropy;
  }
  void ignore(int64_t row) const { write(row, {T(0), T(0), T(0), T(0)}); }
};

// Rows reduced by slices, which merge from left to right. `Op` adds, with `Stats` what is known of
// a slice or of a row:
//   Stats slice(int64_t row, int64_t index) const;
//   void finish(int64_t row, Stats) const;
//   void ignore(int64_t row) const;  // an ignored row is not read
template <typename X, typename Stats, typename Op>
struct RowReduction : Rows<X> {
  explicit RowReduction(const TokenLogprobsInputs& rows) : Rows<X>{rows} {}

  void row(int64_t i) const {
    if (this->ignored(i)) return op().ignore(i);
    reduce(i, [&](int64_t index) { return op().slice(i, index); });
  }

  void run() const {
    check<X>(this->rows);
    this->rows.count < kFewRows ? by_slices() : by_rows();
  }

 private:
  const Op& op() const { return static_cast<const Op&>(*this); }

  template <typename Slice>
  void reduce(int64_t row, const Slice& slice_of) const {
    Stats stats = slice_of(0);
    for (int64_t i = 1; i < ceil_div(this->rows.vocab, kSlice); ++i)
      stats = merge(stats, slice_of(i), this->inv_temperature(row));
    op().finish(row, stats);
  }

  void by_rows() const {
    parallel_for(this->rows.count, kGrain / this->rows.vocab, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row(i);
    });
  }

  void by_slices() const {
    const int64_t slices = ceil_div(this->rows.vocab, kSlice);
    std::vector<Stats> partial(this->rows.count * slices);
    parallel_for(this->rows.count * slices, kGrain / kSlice, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (!this->ignored(i / slices)) partial[i] = op().slice(i / slices, i % slices);
    });
    for (int64_t row = 0; row < this->rows.count; ++row) {
      if (this->ignored(row)) {
        op().ignore(row);
      } else {
        reduce(row, [&](int64_t i) { return partial[row * slices + i]; });
      }
    }
  }
};

}  // namespace fpg
