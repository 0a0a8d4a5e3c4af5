// The module fastpg._cuda: as fastpg._C, with a stream first. Nothing waits for the GPU.
#include <pybind11/pybind11.h>

#include "dtype.h"
#include "value_loss.h"

namespace py = pybind11;

namespace fpg {
namespace {

using Address = uintptr_t;  // 0: absent

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Address of the parts, their number, address of the ticket.
using ScratchTuple = std::tuple<Address, int64_t, Address>;

template <typename Stats>
Scratch<Stats> scratch(const ScratchTuple& in) {
  const auto [parts, blocks, ticket] = in;
  return {at<Stats>(parts), blocks, at<unsigned>(ticket)};
}

void bind_value_loss(py::module_& m) {
  m.def("value_loss", [](Address stream, int dtype, int64_t count, Address values, Address returns,
                         Address weight, Address old_values, double clip, Address loss,
                         Address coefficient, Address stats, const ScratchTuple& parts) {
    with_compute_dtype(dtype, [&](auto x) {
      using T = decltype(x);
      value_loss<T>({at<T>(values), at<T>(returns), at<T>(weight), at<T>(old_values)}, count,
                    T(clip), {at<T>(loss), at<T>(coefficient), at<ValueStats>(stats)},
                    scratch<ValueStats>(parts), at<CUstream_st>(stream));
    });
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("gpus") = FPG_GPUS;
  bind_value_loss(m);
}

}  // namespace fpg
