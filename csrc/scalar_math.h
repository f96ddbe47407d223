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

// Before a loop that gains nothing from being unrolled: it would cost time to compile, and registers on a GPU.
#ifdef __CUDACC__
#define FSL_ROLLED _Pragma("unroll 1")
#else
#define FSL_ROLLED _Pragma("GCC unroll 1")
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
#ifdef __CUDACC__
// On a GPU a row's own logarithm and reciprocal are arithmetic: of ten classes each would be a tenth of a special function a logit.

// -log a of a positive normal number, rest being 1 - a: where that is small it may be better known than a.
__device__ __forceinline__ float minus_log(float a, float rest) {
  const int bits = __float_as_int(a), power = (bits - 0x3f2aaaab) & int(0xff800000);  // 2/3 <= a / 2^power < 4/3
  const float exponent = __int_as_float((power >> 23) + 0x4b400000) - 12582912.f;     // a conversion is slow
  const float u = power == 0 ? rest : 1.f - __int_as_float(bits - power);
  float p = fmaf(0.152690589f, u, 0.169911802f);
  p = fmaf(p, u, 0.164404467f);
  p = fmaf(p, u, 0.198181316f);
  p = fmaf(p, u, 0.25006339f);
  p = fmaf(p, u, 0.333367348f);
  p = fmaf(p, u, 0.499999613f);
  return fmaf(exponent, -0.693147181f, fmaf(u * u, p, u));
}
#endif
#ifdef __CUDA_ARCH__
FSL_FN float log(float a) { return fmaf(a, 0.f, -minus_log(a, 1.f - a)); }  // NaN of infinity and NaN
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

// 1 / a for a number a between 2^-120 and 2^120.
template <class T>
FSL_FN T inverse(T a) {
  return T(1) / a;
}
#ifdef __CUDA_ARCH__
FSL_FN float inverse(float a) {
  const float guess = __int_as_float(0x7ef31000 - __float_as_int(a)), off = 1.f - a * guess;  // at most 0.05
  const float near = guess + guess * (off + off * off);
  return near + near * (1.f - a * near);
}
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

// log a, where a is 1 + more if more is near 0; more is not below 0.
template <class T>
FSL_FN T log_of_sum(T a, T more) {
  return select(more > T(kNearZero), log(a), log1p_near_zero(more));
}
#ifdef __CUDA_ARCH__
FSL_FN float log_of_sum(float a, float more) { return fmaf(a, 0.f, -minus_log(a, more > float(kNearZero) ? 1.f - a : -more)); }
#endif

}  // namespace fastsoftloss
