// The module fastpg._C: addresses, sizes and strides in, nothing out. The pages have checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dtype.h"
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

LogitRows logit_rows(Address logits, int dtype, int64_t count, int64_t inner, int64_t outer_stride,
                     int64_t inner_stride, int64_t vocab, Address labels, Address temperatures,
                     double temperature, double softcap, int64_t ignore_index) {
  return {at(logits), dtype, count, inner, outer_stride, inner_stride, vocab,
          at<int64_t>(labels), at(temperatures), temperature, softcap, ignore_index};
}

void bind_policy_loss(int dtype, int64_t count, Address logp, Address advantages, Address weight,
                      Address old_logp, Address ref_logp, Address entropy, double low, double high,
                      int surrogate, int kl, double kl_coef, double entropy_coef, Address loss,
                      Address coefficient, Address stats) {
  with_compute_dtype(dtype, [&](auto x) {
    using T = decltype(x);
    policy_loss<T>({at<T>(logp), at<T>(advantages), at<T>(weight), at<T>(old_logp),
                    at<T>(ref_logp), at<T>(entropy)}, count,
                   {low, high, Surrogate(surrogate), PolicyKl(kl), kl_coef, entropy_coef},
                   {at<T>(loss), at<T>(coefficient), at<double>(stats)});
  });
}

void bind_value_loss(int dtype, int64_t count, Address values, Address returns, Address weight,
                     Address old_values, double clip, Address loss, Address coefficient,
                     Address stats) {
  with_compute_dtype(dtype, [&](auto x) {
    using T = decltype(x);
    value_loss<T>({at<T>(values), at<T>(returns), at<T>(weight), at<T>(old_values)}, count,
                  T(clip), {at<T>(loss), at<T>(coefficient), at<double>(stats)});
  });
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
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("set_parallel_for", [](Address function) {
    torch_parallel_for = reinterpret_cast<TorchParallelFor>(function);
  });
  m.def("instruction_sets", instruction_sets, "The instruction sets of this machine, best first.");
  m.def("instruction_set", [] { return kernels().name; }, "The one in use.");
  m.def("use_instruction_set", use_instruction_set);
  py::class_<LogitRows>(m, "LogitRows").def(py::init(&logit_rows));
  m.def("token_logprobs", [](const LogitRows& rows, Address logp, Address entropy, Address max,
                             Address log_sum) {
    token_logprobs(rows, {at(logp), at(entropy), at(max), at(log_sum)});
  }, unlocked);
  m.def("token_logprobs_backward", [](const LogitRows& rows, Address grad_logp,
                                      Address grad_entropy, Address entropy, Address max,
                                      Address log_sum, Address grad_logits) {
    token_logprobs_backward(
        rows, {at(grad_logp), at(grad_entropy), at(entropy), at(max), at(log_sum)},
        at(grad_logits));
  }, unlocked);
  m.def("policy_loss", bind_policy_loss, unlocked);
  m.def("value_loss", bind_value_loss, unlocked);
}

}  // namespace fpg
