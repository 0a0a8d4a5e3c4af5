// The choice of an instruction set, made once at load. A file `<op>_simd.cpp` is compiled for each
// of them, with FPG_ISA as its name (setup.py), and defines its table of functions in the namespace
// of that name; everything else is compiled for the baseline.
#pragma once

#include <vector>

namespace fpg {

enum class InstructionSet : int { kBaseline, kAvx2, kAvx512 };

namespace baseline {
template <typename Table>
const Table& table();
}
namespace avx2 {
template <typename Table>
const Table& table();
}
namespace avx512 {
template <typename Table>
const Table& table();
}

InstructionSet selected_instruction_set();

// The loops of an op for the instruction set in use.
template <typename Table>
const Table& kernels() {
#if defined(__x86_64__)
  if (selected_instruction_set() == InstructionSet::kAvx512) return avx512::table<Table>();
  if (selected_instruction_set() == InstructionSet::kAvx2) return avx2::table<Table>();
#endif
  return baseline::table<Table>();
}

// Those that this machine can run, best first.
const std::vector<InstructionSet>& supported_instruction_sets();
const char* name_of(InstructionSet set);
// Returns false for one that this machine cannot run.
bool select_instruction_set(const char* name);

}  // namespace fpg
