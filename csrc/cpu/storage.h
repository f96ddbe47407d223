// Between the dtype in memory and the lanes of the arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

#include "../scalar_math.h"

namespace fastsoftloss {

enum class Storage : int { float32, float64, bfloat16, float16 };

FSL_FN int64_t bytes_of(Storage s) { return s == Storage::float64 ? 8 : s == Storage::float32 ? 4 : 2; }

FSL_FN uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FSL_FN float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// Branch-free, so that the compiler makes vectors of them.
FSL_FN float from_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }
FSL_FN uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // ties to even
  return uint16_t(x != x ? 0x7fc0 : nearest);
}
FSL_FN float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  const float magnitude = float_of(rest) * 0x1p112f;               // moves the exponent's bias, subnormals included
  const uint32_t special = rest >= 0x0f800000 ? 0x7f800000u : 0u;  // inf and NaN keep a full exponent
  return float_of(sign | bits_of(magnitude) | special);
}
FSL_FN uint16_t to_float16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000;
  const float magnitude = float_of(u & 0x7fffffff);
  // a subnormal's last bit is 2^-24: adding 0.5 puts it last in the sum, rounded to even
  const uint32_t small = bits_of(magnitude + 0.5f) - 0x3f000000;
  const uint32_t m = bits_of(magnitude);
  const uint32_t normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  const uint32_t finite = m < 0x38800000 ? small : normal;
  const uint32_t bounded = m >= 0x477ff000 ? 0x7c00 : finite;  // from 65520 on, infinity
  return uint16_t(sign | (m > 0x7f800000 ? 0x7e00 : bounded));
}

template <class T>
FSL_FN void load_contiguous(const void* from, Storage storage, int64_t count, T* to) {
  if (storage == Storage::bfloat16) {
    const auto* p = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = T(from_bfloat16(p[i]));
  } else if (storage == Storage::float16) {
    const auto* p = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = T(from_float16(p[i]));
  } else {
    memcpy(to, from, count * sizeof(T));
  }
}

template <class T>
FSL_FN void store_contiguous(const T* from, Storage storage, int64_t count, void* to) {
  if (storage == Storage::bfloat16) {
    auto* p = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat16(float(from[i]));
  } else if (storage == Storage::float16) {
    auto* p = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) p[i] = to_float16(float(from[i]));
  } else {
    memcpy(to, from, count * sizeof(T));
  }
}

template <class T>
FSL_FN T load_one(const char* p, Storage storage) {
  T x;
  load_contiguous(p, storage, 1, &x);
  return x;
}

template <class T>
FSL_FN void store_one(T x, Storage storage, char* p) {
  store_contiguous(&x, storage, 1, p);
}

}  // namespace fastsoftloss
