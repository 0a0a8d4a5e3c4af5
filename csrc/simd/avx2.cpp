// AVX2 and FMA; setup.py passes the flags.
#define FPG_ISA avx2
#include "simd/kernels.inc"
