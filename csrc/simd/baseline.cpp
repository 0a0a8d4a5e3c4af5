// What every machine of the architecture runs: SSE2 on x86-64, NEON on aarch64.
#define FPG_ISA baseline
#include "simd/kernels.inc"
