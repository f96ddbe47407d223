// The kernels in AVX-512; setup.py gives this file, and no other, the flags for it.
#if defined(__AVX512F__)
#define FSL_ISA avx512
#define FSL_BYTES 64
#include "kernels_impl.h"
#endif
