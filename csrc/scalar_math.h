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
FSL_FN float log(float a) { return __log2f(a) * 0.693147181f; }  // one special function, within 2e-7 of the value from 5/4 on
#else
FSL_FN float log(float a) { return logf(a); }
#endif
FSL_FN double log(double a) { return ::log(a); }

// exp(a) = exp_but(a, rest) (1 + rest) for a finite a <= 0: for who multiplies by something near 1 anyhow.
template <class T>
FSL_FN T exp_but(T a, T& rest) {
  rest = T(0);
  return exp(a);
}
#ifdef __CUDA_ARCH__
FSL_FN float exp_but(float a, float& rest) {
  const float y = a * 1.44269504f;
  rest = (fmaf(a, 1.44269504f, -y) + a * 1.92596299e-8f) * 0.693147181f;
  return exp2f(y);
}
#endif

// 1 / a for a number a that has a normal inverse.
template <class T>
FSL_FN T inverse(T a) {
  return T(1) / a;
}
#ifdef __CUDA_ARCH__
FSL_FN float inverse(float a) { return __fdividef(1.f, a); }  // the last bit aside, without the way round of a division
#endif

// log(1 + a) for 0 <= a <= kNearZero, to the last digits of a; the polynomial is float32's.
constexpr double kNearZero = 0.25;
template <class T>
FSL_FN T log1p_polynomial(T a) {
  const T p = a * (a * (a * (a * T(-0.0923484117f) + T(0.181709215f)) + T(-0.247781202f)) + T(0.333208263f)) + T(-0.499997377f);
  return a * (a * p + T(1));
}
FSL_FN float log1p_near_zero(float a) { return log1p_polynomial(a); }
FSL_FN double log1p_near_zero(double a) { return ::log1p(a); }

}  // namespace fastsoftloss
