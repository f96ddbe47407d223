// The kernels in what every machine of this architecture has: SSE2, NEON, ...
#define FSL_ISA baseline
#define FSL_BYTES 16
#include "kernels_impl.h"
