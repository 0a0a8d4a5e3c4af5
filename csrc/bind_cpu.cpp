// The module fastpg._C: addresses, sizes and strides in, nothing out. The pages have checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "parallel.h"
#include "simd/kernels.h"
#include "token_logprobs.h"

namespace py = pybind11;

namespace fpg {

TorchParallelFor torch_parallel_for = nullptr;

namespace {

using Address = uintptr_t;  // 0: absent

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// LogitRows, as the tuple that the page makes: logits, dtype, count, inner, outer and inner stride,
// vocab, labels, temperature, temperature_per_row, softcap, ignore_index.
using LogitRowsTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t,
                                  Address, Address, bool, double, int64_t>;

LogitRows logit_rows(const LogitRowsTuple& rows) {
  const auto [logits, dtype, count, inner, outer_stride, inner_stride, vocab, labels, temperature,
              temperature_per_row, softcap, ignore_index] = rows;
  return {at(logits),      dtype,
          count,           inner,
          outer_stride,    inner_stride,
          vocab,           at<int64_t>(labels),
          at(temperature), temperature_per_row,
          softcap,         ignore_index};
}

void bind_token_logprobs(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def(
      "token_logprobs",
      [](const LogitRowsTuple& rows, Address logp, Address entropy, Address stats) {
        token_logprobs(logit_rows(rows), {at(logp), at(entropy), at(stats)});
      },
      unlocked);
  m.def(
      "token_logprobs_backward",
      [](const LogitRowsTuple& rows, Address grad_logp, Address grad_entropy, Address entropy,
         Address stats, Address grad_logits) {
        token_logprobs_backward(logit_rows(rows),
                                {at(grad_logp), at(grad_entropy), at(entropy), at(stats)},
                                at(grad_logits));
      },
      unlocked);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto table = supported_kernels(); *table; ++table) names.emplace_back((*table)->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  if (!select_kernels(name.c_str()))
    throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("set_parallel_for", [](Address function) {
    torch_parallel_for = reinterpret_cast<TorchParallelFor>(function);
  });
  m.def("instruction_sets", instruction_sets, "The instruction sets of this machine, best first.");
  m.def("instruction_set", [] { return kernels().name; }, "The one in use.");
  m.def("use_instruction_set", use_instruction_set);
  bind_token_logprobs(m);
}

}  // namespace fpg
