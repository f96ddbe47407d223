// Between the dtype in memory and the registers of the arithmetic: single logits, and vectors of 16 bytes.
#pragma once

#include <cuda_fp16.h>

#include "job.h"

namespace fastsoftloss {
namespace cuda {

#define FSL_DEVICE __device__ __forceinline__

FSL_DEVICE uint4 load16(const char* p) { return *reinterpret_cast<const uint4*>(p); }
FSL_DEVICE void store16(char* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

FSL_DEVICE uint32_t word_of(const uint4& v, int i) { return i < 2 ? (i == 0 ? v.x : v.y) : (i == 2 ? v.z : v.w); }
FSL_DEVICE void set_word(uint4& v, int i, uint32_t w) {
  v.x = i == 0 ? w : v.x, v.y = i == 1 ? w : v.y, v.z = i == 2 ? w : v.z, v.w = i == 3 ? w : v.w;
}

template <Storage S>
struct Memory;

template <>
struct Memory<Storage::float64> {
  using T = double;
  static constexpr int kBytes = 8;
  static FSL_DEVICE T load(const char* p) { return *reinterpret_cast<const T*>(p); }
  static FSL_DEVICE void store(char* p, T x) { *reinterpret_cast<T*>(p) = x; }
};

template <>
struct Memory<Storage::float32> {
  using T = float;
  static constexpr int kBytes = 4, kVector = 4;
  static FSL_DEVICE T load(const char* p) { return *reinterpret_cast<const T*>(p); }
  static FSL_DEVICE void store(char* p, T x) { *reinterpret_cast<T*>(p) = x; }
  static FSL_DEVICE void load_two(const char* p, float& low, float& high) { low = load(p), high = load(p + 4); }
  static FSL_DEVICE void store_two(char* p, float low, float high) { store(p, low), store(p + 4, high); }
  static FSL_DEVICE void unpack(uint4 v, float (&z)[4]) {
    z[0] = __uint_as_float(v.x), z[1] = __uint_as_float(v.y), z[2] = __uint_as_float(v.z), z[3] = __uint_as_float(v.w);
  }
  static FSL_DEVICE uint4 pack(const float (&z)[4]) {
    return make_uint4(__float_as_uint(z[0]), __float_as_uint(z[1]), __float_as_uint(z[2]), __float_as_uint(z[3]));
  }
  // The logit at `place` of a vector, which is overwritten with the one at `from`, and with the one beside it.
  static FSL_DEVICE float take(uint4& v, int place, int from, float& twin) {
    const uint32_t own = word_of(v, place), other = word_of(v, from);
    set_word(v, place, other);
    twin = __uint_as_float(other);
    return __uint_as_float(own);
  }
  static FSL_DEVICE float take(uint4& v, int place, float& twin) { return take(v, place, place ^ 1, twin); }
};

// The two 16-bit types, two to a word: the low half first.
template <class Half>
struct Halves {
  using T = float;
  static constexpr int kBytes = 2, kVector = 8;
  static FSL_DEVICE float take(uint4& v, int place, int from, float& twin) {
    const uint32_t word = word_of(v, place / 2), beside = word_of(v, from / 2);
    const uint32_t own = place % 2 ? word >> 16 : word & 0xffff, other = from % 2 ? beside >> 16 : beside & 0xffff;
    set_word(v, place / 2, place % 2 ? (word & 0xffff) | other << 16 : (word & 0xffff0000u) | other);
    twin = Half::widen(other);
    return Half::widen(own);
  }
  static FSL_DEVICE float take(uint4& v, int place, float& twin) {  // within a word
    const uint32_t word = word_of(v, place / 2);
    const bool high = place % 2;
    const uint32_t own = high ? word >> 16 : word & 0xffff, other = high ? word & 0xffff : word >> 16;
    set_word(v, place / 2, other * 0x10001u);
    twin = Half::widen(other);
    return Half::widen(own);
  }
  static FSL_DEVICE void unpack(uint4 v, float (&z)[8]) {
    Half::widen_two(v.x, z[0], z[1]), Half::widen_two(v.y, z[2], z[3]), Half::widen_two(v.z, z[4], z[5]), Half::widen_two(v.w, z[6], z[7]);
  }
  static FSL_DEVICE uint4 pack(const float (&z)[8]) {
    return make_uint4(Half::narrow(z[0], z[1]), Half::narrow(z[2], z[3]), Half::narrow(z[4], z[5]), Half::narrow(z[6], z[7]));
  }
  static FSL_DEVICE float load(const char* p) { return Half::widen(*reinterpret_cast<const uint16_t*>(p)); }
  static FSL_DEVICE void store(char* p, float x) { *reinterpret_cast<uint16_t*>(p) = uint16_t(Half::narrow(x, 0.f)); }
  // two neighbours at a multiple of 4 bytes
  static FSL_DEVICE void load_two(const char* p, float& low, float& high) {
    Half::widen_two(*reinterpret_cast<const uint32_t*>(p), low, high);
  }
  static FSL_DEVICE void store_two(char* p, float low, float high) { *reinterpret_cast<uint32_t*>(p) = Half::narrow(low, high); }
};

struct Bfloat16 {
  static FSL_DEVICE float widen(uint32_t h) { return __uint_as_float(h << 16); }
  static FSL_DEVICE void widen_two(uint32_t w, float& low, float& high) {
    low = __uint_as_float(w << 16), high = __uint_as_float(w & 0xffff0000u);
  }
  static FSL_DEVICE uint32_t narrow(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};

struct Float16 {
  static FSL_DEVICE float widen(uint32_t h) { return __half2float(__ushort_as_half(uint16_t(h))); }
  static FSL_DEVICE void widen_two(uint32_t w, float& low, float& high) { low = widen(w & 0xffff), high = widen(w >> 16); }
  static FSL_DEVICE uint32_t narrow(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};

template <>
struct Memory<Storage::bfloat16> : Halves<Bfloat16> {};
template <>
struct Memory<Storage::float16> : Halves<Float16> {};

// A row of class stride 1 and sixteen classes or more: classes before the first 16-byte boundary, whole vectors, classes behind
// the last.
template <Storage S>
struct Span {
  using M = Memory<S>;
  static constexpr int V = M::kVector;
  int head, vectors, tail;

  FSL_DEVICE Span(const char* p, int classes) {
    head = (-unsigned(reinterpret_cast<uintptr_t>(p)) & 15) / M::kBytes;
    vectors = unsigned(classes - head) / unsigned(V);
    tail = unsigned(classes - head) % unsigned(V);
  }
  // The vector that holds class k, or -1.
  FSL_DEVICE int vector(int k) const {
    const unsigned v = unsigned(k - head) / unsigned(V);
    return v < unsigned(vectors) ? int(v) : -1;
  }
  // The logit of class k, which vector v holds, overwritten with that of `twin`, another class of it that is not `avoid`.
  FSL_DEVICE float take(uint4& v, int k, int avoid, float& twin) const {
    const int place = (k - head) % V;
    if (avoid >= 0 && ((avoid - head) ^ (k - head)) == 1) return M::take(v, place, place ^ 2, twin);
    return M::take(v, place, twin);
  }
  // The class before or behind the vectors that falls to this lane, or -1; there are no more than two vectors of them.
  FSL_DEVICE int edge(int lane) const {
    if (lane < V) return lane < head ? lane : -1;
    return lane < V + tail ? head + vectors * V + lane - V : -1;
  }
};

}  // namespace cuda
}  // namespace fastsoftloss
