// The module fastpg._C: the ops in C++, each bound in its own file, and the choice of their
// instruction set.
#include "common/module.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {

TorchParallelFor torch_parallel_for = nullptr;

namespace {

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
  m.def("set_parallel_for", [](uintptr_t function) {
    torch_parallel_for = reinterpret_cast<TorchParallelFor>(function);
  });
  m.def("instruction_sets", instruction_sets, "The instruction sets of this machine, best first.");
  m.def("instruction_set", [] { return name_of(selected_instruction_set()); }, "The one in use.");
  m.def("use_instruction_set", use_instruction_set);
}

}  // namespace fpg
