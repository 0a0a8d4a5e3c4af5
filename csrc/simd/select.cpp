// What the machine can run, and what it runs.
#include "simd/select.h"

#include <string.h>

namespace fpg {
namespace {

std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();  // This may run before the constructor that would call it.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    sets.push_back(InstructionSet::kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    sets.push_back(InstructionSet::kAvx2);
#endif
  sets.push_back(InstructionSet::kBaseline);
  return sets;
}

InstructionSet selected = supported().front();

}  // namespace

InstructionSet selected_instruction_set() { return selected; }

const std::vector<InstructionSet>& supported_instruction_sets() {
  static const std::vector<InstructionSet> sets = supported();
  return sets;
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kBaseline:
      return "baseline";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
  }
  return "";
}

bool select_instruction_set(const char* name) {
  for (const InstructionSet set : supported_instruction_sets()) {
    if (strcmp(name_of(set), name) != 0) continue;
    selected = set;
    return true;
  }
  return false;
}

}  // namespace fpg
