// The module fastpg._C: addresses, sizes and strides in, nothing out. The pages have checked them.
// Each function is a lambda of numbers and addresses; what a forward and its backward share is a
// tuple.
#include <array>

#include "common/dtype.h"
#include "common/module.h"
#include "common/parallel.h"
#include "common/sequences.h"
#include "loss/kl_estimate.h"
#include "loss/policy_loss_from_logits.h"
#include "simd/select.h"
#include "vocabulary/token_logprobs.h"

namespace py = pybind11;

namespace fpg {

TorchParallelFor torch_parallel_for = nullptr;

namespace {

// Defines an op without the interpreter's lock.
template <typename F>
void def(py::module_& m, const char* name, const F& function) {
  m.def(name, function, py::call_guard<py::gil_scoped_release>());
}

// The fields of TokenLogprobsInputs.
using LogitRowsTuple = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t,
                                  Address, Address, bool, double, int64_t, bool>;

TokenLogprobsInputs logit_rows(const LogitRowsTuple& rows) {
  const auto [logits, dtype, count, inner, outer_stride, inner_stride, vocab, labels, temperature,
              temperature_per_row, softcap, ignore_index, with_entropy] = rows;
  return {dtype,
          count,
          inner,
          outer_stride,
          inner_stride,
          vocab,
          temperature_per_row,
          {at(logits)},
          at<int64_t>(labels),
          at(temperature),
          softcap,
          ignore_index,
          with_entropy};
}

void bind_policy_loss_from_logits(py::module_& m) {
  def(m, "policy_loss_from_logits",
      [](const LogitRowsTuple& rows, int dtype, Address advantages, Address weight,
         Address old_logp, Address ref_logp, int surrogate, int kl,
         const std::array<double, 7>& numbers, Address on_device, Address logp, Address entropy,
         Address row_stats, Address coefficient, Address grad_entropy, Address out, Address loss,
         Address stats) {
        with_compute_dtype(dtype, [&](auto x) {
          using T = decltype(x);
          policy_loss_from_logits<T>(
              logit_rows(rows),
              {at<T>(logp), at<T>(advantages), at<T>(weight), at<T>(old_logp), nullptr,
               at<T>(ref_logp), at<T>(entropy)},
              {Surrogate(surrogate), PolicyKl(kl), __builtin_bit_cast(LossOptions, numbers),
               at<LossOptions>(on_device)},
              {at<T>(logp), at<T>(entropy), at<T>(row_stats), at<T>(grad_entropy), at(out)},
              {at<T>(loss), at<T>(coefficient), at<PolicyStats>(stats)});
        });
      });
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet set : supported_instruction_sets()) names.emplace_back(name_of(set));
  return names;
}

void use_instruction_set(const std::string& name) {
  if (!select_instruction_set(name.c_str()))
    throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  add_ops(m);
  m.def("set_parallel_for", [](Address function) {
    torch_parallel_for = reinterpret_cast<TorchParallelFor>(function);
  });
  m.def("instruction_sets", instruction_sets, "The instruction sets of this machine, best first.");
  m.def("instruction_set", [] { return name_of(selected_instruction_set()); }, "The one in use.");
  m.def("use_instruction_set", use_instruction_set);
  bind_policy_loss_from_logits(m);
}

}  // namespace fpg
