// The threads that share a row: 1 to 32 lanes of a warp, or all warps of a block.
#pragma once

#include "storage.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kMostWarps = 8, kMostSums = 5;

template <class T>
struct Group {
  int size, lane;    // threads a row, a power of two, and which one this is
  int shift;         // size is 1 << shift
  int index, count;  // which of the block's rows, and how many it has at a time
  unsigned mask;     // the group's lanes in their warp
  T* exchange;       // shared memory for kMostWarps * kMostSums values, where several warps share a row

  FSL_DEVICE Group(int size, T* exchange) : size(size), exchange(exchange) {
    lane = threadIdx.x & (size - 1);
    shift = 31 - __clz(size);
    index = threadIdx.x >> shift;
    count = blockDim.x >> shift;
    mask = size >= 32 ? ~0u : ((1u << size) - 1) << (threadIdx.x & 31 & ~(size - 1));
  }

  FSL_DEVICE void sync() const {
    if (size == 1) return;
    if (size <= 32) {
      __syncwarp(mask);
    } else {
      __syncthreads();
    }
  }
  // Sums over the group, the same bits in each of its threads; every thread of the group must come here.
  template <int N>
  FSL_DEVICE void sum(T (&v)[N]) const {
    sum_by_warps(v);
    if (size > 32) sum_of_warps(v);
  }
  // The same for lane 0 alone. What others read before, lane 0 may overwrite after.
  template <int N>
  FSL_DEVICE void sum_for_first(T (&v)[N]) const {
    sum_by_warps(v);
    if (size <= 32) {
      __syncwarp(mask);
    } else if (lane == 0) {
      sum_of_warps(v);
    }
  }
  // What the first thread has, in a group of one warp at most.
  template <class X>
  FSL_DEVICE X of_first(X v) const {
    return size == 1 ? v : __shfl_sync(mask, v, 0, size);
  }
  // What one of the threads has, for all; `slot` is one value of shared memory, and the next sum lets it go.
  FSL_DEVICE T of(int which, T v, T* slot) const {
    if (size <= 32) return __shfl_sync(mask, v, which, size);
    if (lane == which) *slot = v;
    __syncthreads();
    return *slot;
  }
  FSL_DEVICE T largest(T m) const {
#pragma unroll
    for (int o = 16; o > 0; o /= 2)
      if (o < size) m = max(m, __shfl_xor_sync(mask, m, o));
    if (size <= 32) return m;
    __syncthreads();
    if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32] = m;
    __syncthreads();
    m = exchange[0];
#pragma unroll 1
    for (int w = 1; w < size / 32; ++w) m = max(m, exchange[w]);
    return m;
  }
  // The two largest of all threads' two, each in descending order.
  template <int N>
  FSL_DEVICE void largest_two(T (&v)[N][2]) const {
#pragma unroll
    for (int o = 16; o > 0; o /= 2)
      if (o < size) {
#pragma unroll
        for (int i = 0; i < N; ++i) keep_two(v[i], __shfl_xor_sync(mask, v[i][0], o), __shfl_xor_sync(mask, v[i][1], o));
      }
    if (size <= 32) return;
    static_assert(2 * N <= kMostSums, "see exchange");
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) exchange[threadIdx.x / 32 * 2 * N + i] = v[i / 2][i % 2];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) v[i / 2][i % 2] = exchange[i];
#pragma unroll 1
    for (int w = 1; w < size / 32; ++w) {
#pragma unroll
      for (int i = 0; i < N; ++i) keep_two(v[i], exchange[w * 2 * N + 2 * i], exchange[w * 2 * N + 2 * i + 1]);
    }
  }
  // Of v and another pair, both in descending order. NaN is nothing to the largest, and makes the second what may be said of it.
  static FSL_DEVICE void keep_two(T (&v)[2], T a, T b) {
    v[1] = fmax(fmax(fmin(v[0], a), v[1]), b);
    v[0] = fmax(v[0], a);
  }
  static FSL_DEVICE void keep_two(T (&v)[2], T a) {
    v[1] = fmax(fmin(v[0], a), v[1]);
    v[0] = fmax(v[0], a);
  }

 private:
  template <int N>
  FSL_DEVICE void sum_by_warps(T (&v)[N]) const {
    static_assert(N <= kMostSums, "see exchange");
    if (size == 1) return;
#pragma unroll
    for (int o = 16; o > 0; o /= 2)
      if (o < size) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(mask, v[i], o);
      }
    if (size <= 32) return;
    __syncthreads();  // whoever still reads what the last exchange left
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) exchange[threadIdx.x / 32 * N + i] = v[i];
    }
    __syncthreads();
  }
  template <int N>
  FSL_DEVICE void sum_of_warps(T (&v)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = exchange[i];
#pragma unroll 1  // a row loop around it would keep what the unrolled one counts with
    for (int w = 1; w < size / 32; ++w) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += exchange[w * N + i];
    }
  }
};

}  // namespace cuda
}  // namespace fastsoftloss
