// The threads that share a row: 1 to 32 lanes of a warp, or all warps of a block.
#pragma once

#include "storage.cuh"

namespace fastsoftloss {
namespace cuda {

constexpr int kMostWarps = 8;

template <class T>
struct Group {
  int size, lane;    // threads a row, and which one this is
  int index, count;  // which of the block's rows, and how many it has at a time
  unsigned mask;     // the group's lanes in their warp
  T* exchange;       // shared memory for kMostWarps * 4 values, where several warps share a row

  FSL_DEVICE Group(int size, T* exchange) : size(size), exchange(exchange) {
    lane = threadIdx.x & (size - 1);
    index = threadIdx.x / size;
    count = blockDim.x / size;
    mask = size >= 32 ? ~0u : ((1u << size) - 1) << (threadIdx.x & 31 & ~(size - 1));
  }

  // Sums over the group, the same bits in each of its threads; every thread of the group must come here.
  template <int N>
  FSL_DEVICE void sum(T (&v)[N]) const {
    static_assert(N <= 4, "see exchange");
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
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = exchange[i];
    for (int w = 1; w < size / 32; ++w) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += exchange[w * N + i];
    }
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
    for (int w = 1; w < size / 32; ++w) m = max(m, exchange[w]);
    return m;
  }
};

}  // namespace cuda
}  // namespace fastsoftloss
