// Vec<T>: 64 bytes of lanes in as many native vectors as the instruction set needs, so that a sum has the same order on
// each. FSL_BYTES is the native width and FSL_ISA the name of the instruction set; a translation unit has one.
#pragma once

#if FSL_BYTES == 64
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../row_loss.h"

#define FSL_PARTS for (int i = 0; i < 64 / FSL_BYTES; ++i)

namespace fastsoftloss {
namespace FSL_ISA {

// a scalar takes the same names as a Vec
using fastsoftloss::abs;
using fastsoftloss::exp;
using fastsoftloss::log;
using fastsoftloss::log1p_near_zero;
using fastsoftloss::max;
using fastsoftloss::select;

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float Value __attribute__((vector_size(FSL_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FSL_BYTES), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(FSL_BYTES)));
};
template <>
struct Native<double> {
  typedef double Value __attribute__((vector_size(FSL_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FSL_BYTES), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(FSL_BYTES)));
};

template <class T>
using Value = typename Native<T>::Value;

template <class T>
struct Mask {
  typename Native<T>::Bits v[64 / FSL_BYTES];
};

template <class T>
struct Vec {
  using Value = typename Native<T>::Value;
  using Bits = typename Native<T>::Bits;
  using Unaligned = typename Native<T>::Unaligned;
  static constexpr int kLanes = 64 / sizeof(T);
  Value v[64 / FSL_BYTES];

  Vec() = default;
  FSL_FN explicit Vec(T x) {
    for (auto& part : v) part = x - Value{};
  }
  // native vector by native vector: a memcpy of 64 bytes goes through the stack in pieces that stall the next load
  FSL_FN static Vec load(const T* p) {
    Vec r;
    FSL_PARTS r.v[i] = reinterpret_cast<const Unaligned*>(p)[i];
    return r;
  }
  FSL_FN void store(T* p) const { FSL_PARTS reinterpret_cast<Unaligned*>(p)[i] = v[i]; }
};

}  // namespace FSL_ISA

template <class T>
struct Limits<FSL_ISA::Vec<T>> : std::numeric_limits<T> {};

namespace FSL_ISA {

#define FSL_ARITHMETIC(op)                        \
  template <class T>                              \
  FSL_FN Vec<T> operator op(Vec<T> a, Vec<T> b) { \
    FSL_PARTS a.v[i] = a.v[i] op b.v[i];          \
    return a;                                     \
  }
FSL_ARITHMETIC(+)
FSL_ARITHMETIC(-)
FSL_ARITHMETIC(*)
FSL_ARITHMETIC(/)
#undef FSL_ARITHMETIC

#define FSL_COMPARISON(op)                         \
  template <class T>                               \
  FSL_FN Mask<T> operator op(Vec<T> a, Vec<T> b) { \
    Mask<T> r;                                     \
    FSL_PARTS r.v[i] = a.v[i] op b.v[i];           \
    return r;                                      \
  }
FSL_COMPARISON(<)
FSL_COMPARISON(>)
FSL_COMPARISON(==)
FSL_COMPARISON(!=)
#undef FSL_COMPARISON

template <class T>
FSL_FN Mask<T> operator|(Mask<T> a, Mask<T> b) {
  FSL_PARTS a.v[i] |= b.v[i];
  return a;
}

template <class T>
FSL_FN Vec<T> select(Mask<T> c, Vec<T> a, Vec<T> b) {
  FSL_PARTS a.v[i] = c.v[i] ? a.v[i] : b.v[i];
  return a;
}

template <class T>
FSL_FN Vec<T> max(Vec<T> a, Vec<T> b) {
  FSL_PARTS a.v[i] = a.v[i] < b.v[i] ? b.v[i] : a.v[i];
  return a;
}

template <class T>
FSL_FN Vec<T> abs(Vec<T> a) {
  return select(a < Vec<T>(0), Vec<T>(0) - a, a);
}

template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr int kMantissa = 23;
  static constexpr float kLowest = -88.02f;                                   // rounds to 2^-127, whose bits are those of 0
  static constexpr float kMagic = 12582912.0f + 127.0f;                       // 1.5 * 2^23: adding it rounds to an integer, biased
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // Cody and Waite (1980)
  // e^r on |r| <= ln2/2, relative error 4e-9
  static constexpr float kPolynomial[] = {0x1.6a23cep-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f, 1, 1};
};
template <>
struct Exp<double> {
  static constexpr int kMantissa = 52;
  static constexpr double kLowest = -708.9;
  static constexpr double kMagic = 6755399441055744.0 + 1023.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;  // as fdlibm splits it
  // Taylor: the first term left out is 4e-18 of the sum
  static constexpr double kPolynomial[] = {
      1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0, 1 / 5040.0,
      1 / 720.0,        1 / 120.0,       1 / 24.0,       1 / 6.0,       1 / 2.0,      1,           1};
};

// The exponent with what is below every positive number raised to where exp is 0: 0 * -inf cannot appear. NaN stays.
template <class T>
FSL_FN Vec<T> bounded(Vec<T> x) {
  // written so that it is one instruction, which gives its second operand back for a NaN
  FSL_PARTS x.v[i] = Exp<T>::kLowest - Value<T>{} > x.v[i] ? Exp<T>::kLowest - Value<T>{} : x.v[i];
  return x;
}

// exp for x <= 0 that has been through bounded().
template <class T>
FSL_FN Vec<T> exp_bounded(Vec<T> x) {
  using E = Exp<T>;
  constexpr T kLog2E = T(1.4426950408889634);
  FSL_PARTS {
    const auto biased = x.v[i] * kLog2E + E::kMagic;
    const auto n = biased - E::kMagic;
    const auto r = (x.v[i] - n * E::kLn2High) - n * E::kLn2Low;
    auto y = r * E::kPolynomial[0] + E::kPolynomial[1];
    for (unsigned k = 2; k < sizeof(E::kPolynomial) / sizeof(T); ++k) y = y * r + E::kPolynomial[k];
    x.v[i] = y * (typename Vec<T>::Value)((typename Vec<T>::Bits)biased << E::kMantissa);
  }
  return x;
}

template <class T>
FSL_FN Vec<T> exp(Vec<T> x) {
  return exp_bounded(bounded(x));
}

// log for x >= 1e-37 or NaN. The polynomial is that of Cephes' logf (Moshier).
FSL_FN Vec<float> log(Vec<float> x) {
  using Bits = Vec<float>::Bits;
  FSL_PARTS {
    const Bits bits = (Bits)x.v[i] - 0x3f3504f3;  // from sqrt(1/2): m in [sqrt(1/2), sqrt(2))
    const auto e = __builtin_convertvector(bits >> 23, Vec<float>::Value);
    const auto f = (Vec<float>::Value)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    auto y = f * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    y = y * f * f * f + e * -2.12194440e-4f - 0.5f * f * f;
    y = f + y + 0.693359375f * e;
    x.v[i] = x.v[i] == x.v[i] ? y : x.v[i];
  }
  return x;
}
inline Vec<double> log(Vec<double> x) {
  double lanes[8];
  x.store(lanes);
  for (double& lane : lanes) lane = ::log(lane);
  return Vec<double>::load(lanes);
}

FSL_FN Vec<float> log1p_near_zero(Vec<float> x) { return log1p_polynomial(x); }
// with the relative precision of x where 1 + x rounds it away
FSL_FN Vec<double> log1p_near_zero(Vec<double> x) {
  const Vec<double> one(1), w = x + one;
  return log(w) + (x - (w - one)) / w;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FSL_COLUMNS
#endif
#endif

#ifdef FSL_COLUMNS
// Four neighbouring classes of 16 rows, a vector of four floats each, and the four vectors whose lanes are the rows.
struct Columns {
  typedef float Four __attribute__((vector_size(16)));
  typedef float FourAnywhere __attribute__((vector_size(16), aligned(4), may_alias));
  static constexpr int kWidth = FSL_BYTES / 4;
  using V = Value<float>;

// indices into two vectors, the same for every 16 bytes of them
#if FSL_BYTES == 16
#define FSL_EACH(a, b, c, d) a, b, c, d
#elif FSL_BYTES == 32
#define FSL_EACH(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#else
#define FSL_EACH(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#endif
  // lane 4 g + j of p[i] to lane 4 g + i of p[j]
  FSL_FN static void transpose(V (&p)[4]) {
    constexpr int w = kWidth;
    const V a = __builtin_shufflevector(p[0], p[1], FSL_EACH(0, w, 1, w + 1)),
            b = __builtin_shufflevector(p[2], p[3], FSL_EACH(0, w, 1, w + 1));
    const V c = __builtin_shufflevector(p[0], p[1], FSL_EACH(2, w + 2, 3, w + 3)),
            d = __builtin_shufflevector(p[2], p[3], FSL_EACH(2, w + 2, 3, w + 3));
    p[0] = __builtin_shufflevector(a, b, FSL_EACH(0, 1, w, w + 1)), p[1] = __builtin_shufflevector(a, b, FSL_EACH(2, 3, w + 2, w + 3));
    p[2] = __builtin_shufflevector(c, d, FSL_EACH(0, 1, w, w + 1)), p[3] = __builtin_shufflevector(c, d, FSL_EACH(2, 3, w + 2, w + 3));
  }
#undef FSL_EACH

  FSL_FN static Four four(const float* p) { return *reinterpret_cast<const FourAnywhere*>(p); }
  // the four classes from k on, of every fourth row from `row` on
  FSL_FN static V gather(const float* const* row, int64_t k) {
#if FSL_BYTES == 64  // an insertion from memory needs no shuffle, for which the compiler has no other word
    __m512 all = _mm512_castps128_ps512(four(row[0] + k));
    all = _mm512_insertf32x4(all, four(row[4] + k), 1);
    all = _mm512_insertf32x4(all, four(row[8] + k), 2);
    return _mm512_insertf32x4(all, four(row[12] + k), 3);
#elif FSL_BYTES == 32
    return __builtin_shufflevector(four(row[0] + k), four(row[4] + k), 0, 1, 2, 3, 4, 5, 6, 7);
#else
    return four(row[0] + k);
#endif
  }
  // Quarter by quarter in the compiler's own words: of indices it makes one scalar move each.
  FSL_FN static void scatter(V v, float* const* row, int64_t k) {
    const auto to = [&](Four part, int i) { *reinterpret_cast<FourAnywhere*>(row[i] + k) = part; };
    to(__builtin_shufflevector(v, v, 0, 1, 2, 3), 0);
#if FSL_BYTES >= 32
    to(__builtin_shufflevector(v, v, 4, 5, 6, 7), 4);
#endif
#if FSL_BYTES == 64
    to(__builtin_shufflevector(v, v, 8, 9, 10, 11), 8);
    to(__builtin_shufflevector(v, v, 12, 13, 14, 15), 12);
#endif
  }

  FSL_FN static void load(const float* const* row, int64_t k, float (*z)[16]) {
    for (int i = 0; i < 16 / kWidth; ++i) {
      V p[4];
      for (int j = 0; j < 4; ++j) p[j] = gather(row + i * kWidth + j, k);
      transpose(p);
      for (int j = 0; j < 4; ++j) *reinterpret_cast<Native<float>::Unaligned*>(z[j] + i * kWidth) = p[j];
    }
  }
  FSL_FN static void store(const float (*dz)[16], float* const* row, int64_t k) {
    for (int i = 0; i < 16 / kWidth; ++i) {
      V p[4];
      for (int j = 0; j < 4; ++j) p[j] = *reinterpret_cast<const Native<float>::Unaligned*>(dz[j] + i * kWidth);
      transpose(p);
      for (int j = 0; j < 4; ++j) scatter(p[j], row + i * kWidth + j, k);
    }
  }
};
#endif

// Lanes joined in a fixed order, halves upon halves, whatever the native width.
template <class T, class F>
FSL_FN T fold(Vec<T> a, F join) {
  constexpr int kLanes = Vec<T>::kLanes;
  T lanes[kLanes];
  a.store(lanes);
#pragma GCC unroll 8
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] = join(lanes[i], lanes[i + width]);
  return lanes[0];
}
template <class T>
FSL_FN T sum(Vec<T> a) {
  return fold(a, [](T x, T y) { return x + y; });
}
template <class T>
FSL_FN T maximum(Vec<T> a) {
  return fold(a, [](T x, T y) { return x < y ? y : x; });
}

}  // namespace FSL_ISA
}  // namespace fastsoftloss
