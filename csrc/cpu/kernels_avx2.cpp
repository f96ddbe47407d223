// The kernels in AVX2 and FMA; setup.py gives this file, and no other, the flags for it.
#if defined(__AVX2__)
#define FSL_ISA avx2
#define FSL_BYTES 32
#include "kernels_impl.h"
#endif
