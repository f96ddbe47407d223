// The few functions that the moments and the loss are written in, for float and double.
#pragma once

#include <cmath>
#include <limits>

#if defined(FSL_FN)  // the sanitizers' build says what it wants: with all of it inlined it takes minutes
#elif defined(__CUDACC__)
#define FSL_FN __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FSL_FN __forceinline
#else
#define FSL_FN inline __attribute__((always_inline))
#endif

namespace fastsoftloss {

template <class T>
struct Limits : std::numeric_limits<T> {};  // a vector of T has T's

FSL_FN float select(bool c, float a, float b) { return c ? a : b; }
FSL_FN double select(bool c, double a, double b) { return c ? a : b; }
// NaN in the second operand is lost, in the first it is kept: a running maximum stands second
FSL_FN float max(float a, float b) { return a < b ? b : a; }
FSL_FN double max(double a, double b) { return a < b ? b : a; }
FSL_FN float abs(float a) { return fabsf(a); }
FSL_FN double abs(double a) { return fabs(a); }
FSL_FN float exp(float a) { return expf(a); }
FSL_FN double exp(double a) { return ::exp(a); }
#ifdef __CUDA_ARCH__
// a special function each, within 2e-7 near 1 and 2e-6 of the value elsewhere
FSL_FN float log(float a) { return __log2f(a) * 0.693147181f; }
FSL_FN float log1p(float a) {
  const float t = __fdividef(a, 2.f + a), tt = t * t;  // log1p(a) = 2 artanh(t)
  return a < 0.125f ? 2 * t * (1 + tt * (1 / 3.f + tt * 0.2f)) : log(1.f + a);
}
#else
FSL_FN float log(float a) { return logf(a); }
FSL_FN float log1p(float a) { return log1pf(a); }
#endif
FSL_FN double log(double a) { return ::log(a); }
FSL_FN double log1p(double a) { return ::log1p(a); }

}  // namespace fastsoftloss
