// The choice of an instruction set, made once at load.
#include <string.h>

#include "simd/kernels.h"

namespace fpg {
namespace {

struct Supported {
  const Kernels* tables[4] = {};
  Supported() {
    int count = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      tables[count++] = &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables[count++] = &avx2;
#endif
    tables[count] = &baseline;
  }
};

const Supported supported;
const Kernels* selected = supported.tables[0];

}  // namespace

const Kernels& kernels() { return *selected; }

const Kernels* const* supported_kernels() { return supported.tables; }

bool select_kernels(const char* name) {
  for (const Kernels* const* table = supported.tables; *table; ++table) {
    if (strcmp((*table)->name, name) != 0) continue;
    selected = *table;
    return true;
  }
  return false;
}

}  // namespace fpg
