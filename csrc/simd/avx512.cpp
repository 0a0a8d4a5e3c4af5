// AVX-512 F, BW, VL and DQ; setup.py passes the flags.
#define FPG_ISA avx512
#include "simd/kernels.inc"
