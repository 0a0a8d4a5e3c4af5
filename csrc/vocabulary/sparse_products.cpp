// Products with some rows of a matrix alone, row by row of their results over the threads.
#include "vocabulary/sparse_products.h"

#include <algorithm>
#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {
namespace {

// Row i belongs to strip i % kStrips, and a thread gets whole strips: tokens that are in many sets
// tend to be neighbours, and no thread should have them all.
constexpr int64_t kStrips = 64;
// A thread should have at least so many products.
constexpr int64_t kGrain = 32768;
// So many bytes of the matrix stay in a second-level cache, and so many in a third-level one.
constexpr int64_t kNearBytes = 1 << 18;
constexpr int64_t kFarBytes = 1 << 22;
// A block should have at least so many entries of a row.
constexpr int64_t kPiece = 8;

// The rows of a thread, through the matrix block by block: what several of them need of a block is
// read from memory once. The entries of a row are met in their order, whatever the blocks.
struct Walk {
  const int64_t* indices;
  const int64_t* offsets;
  int64_t count;        // of rows with entries
  int64_t matrix_rows;  // of the matrix
  int64_t block;        // rows of the matrix in a block

  // Calls piece(place, row, first, n) with n entries of a row from `first` on, for the rows of the
  // strips begin <= s < end, of which `row` is the one at `place`.
  template <typename Piece>
  void each_piece(int64_t begin, int64_t end, const Piece& piece) const {
    const std::vector<int64_t> rows = rows_of(begin, end);
    std::vector<int64_t> next(rows.size());
    for (size_t place = 0; place < rows.size(); ++place) next[place] = offsets[rows[place]];
    for (int64_t stop = block; stop < matrix_rows + block; stop += block)
      for (size_t place = 0; place < rows.size(); ++place) {
        const int64_t first = next[place];
        const int64_t last = offsets[rows[place] + 1];
        int64_t e = first;
        while (e < last && indices[e] < stop) ++e;
        if (e > first) piece(int64_t(place), rows[place], first, e - first);
        next[place] = e;
      }
  }

  std::vector<int64_t> rows_of(int64_t begin, int64_t end) const {
    std::vector<int64_t> rows;
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t row = strip; row < count; row += kStrips) rows.push_back(row);
    return rows;
  }
};

// The smaller the block, the nearer it stays; but with few entries of a row in it, what is read and
// written beside the matrix would cost as much.
int64_t rows_in_a_block(int64_t row_bytes, int64_t matrix_rows, int64_t entries_of_row) {
  const int64_t enough = kPiece * matrix_rows / std::max<int64_t>(entries_of_row, 1);
  const int64_t near = kNearBytes / row_bytes;
  const int64_t far = kFarBytes / row_bytes;
  return std::max<int64_t>(1, std::min(std::max(near, enough), far));
}

template <typename Arguments>
int64_t entries_of_row(const Arguments& in) {
  return in.offsets[in.count] / std::max<int64_t>(in.count, 1);
}

template <typename Body>
void over_strips(int64_t work, const Body& body) {
  parallel_for(kStrips, kGrain * kStrips / std::max<int64_t>(work, 1), body);
}

void sampled_product(const SampledProductArguments& in) {
  with_float_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    const auto& kernel = kernels<SparseProductsKernels<X>>();
    const X* hidden = static_cast<const X*>(in.hidden);
    const X* head_weight = static_cast<const X*>(in.head_weight);
    auto* products = static_cast<compute_t<X>*>(in.products);
    const Walk walk{in.token_ids, in.offsets, in.count, in.matrix_rows,
                    rows_in_a_block(in.width * sizeof(X), in.matrix_rows, entries_of_row(in))};
    over_strips(in.offsets[in.count] * in.width, [&](int64_t begin, int64_t end) {
      walk.each_piece(begin, end, [&](int64_t, int64_t row, int64_t first, int64_t n) {
        kernel.sampled_row(hidden + row * in.width, head_weight, in.token_ids + first, n, in.width,
                           products + first);
      });
    });
  });
}

// With fewer sums than rows of the matrix, the sums stay near and the matrix passes by in blocks;
// else each sum is made at once, and the matrix stays near.
void sparse_product(const SparseProductArguments& in) {
  with_float_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    using T = compute_t<X>;
    const auto& kernel = kernels<SparseProductsKernels<X>>();
    const X* matrix = static_cast<const X*>(in.matrix);
    const T* coefficients = static_cast<const T*>(in.coefficients);
    X* sums = static_cast<X*>(in.sums);
    const Walk walk{in.indices, in.offsets, in.count, in.matrix_rows,
                    rows_in_a_block(in.width * sizeof(X), in.matrix_rows, entries_of_row(in))};
    const auto add = [&](int64_t first, int64_t n, T* sum) {
      kernel.add_rows(coefficients + first, matrix, in.indices + first, n, in.width, sum);
    };
    over_strips((in.offsets[in.count] + in.count) * in.width, [&](int64_t begin, int64_t end) {
      const std::vector<int64_t> rows = walk.rows_of(begin, end);
      if (in.count < in.matrix_rows) {
        std::vector<T> sum(rows.size() * in.width);
        walk.each_piece(begin, end, [&](int64_t place, int64_t, int64_t first, int64_t n) {
          add(first, n, sum.data() + place * in.width);
        });
        for (size_t place = 0; place < rows.size(); ++place)
          kernel.round_row(sum.data() + place * in.width, in.width, sums + rows[place] * in.width);
      } else {
        std::vector<T> sum(in.width);
        for (const int64_t row : rows) {
          std::fill(sum.begin(), sum.end(), T(0));
          add(in.offsets[row], in.offsets[row + 1] - in.offsets[row], sum.data());
          kernel.round_row(sum.data(), in.width, sums + row * in.width);
        }
      }
    });
  });
}

FPG_BIND(sampled_product, sampled_product)
FPG_BIND(sparse_product, sparse_product)

}  // namespace
}  // namespace fpg
