// From row losses to the reduced loss: every block adds its rows up in one order, and one block adds up the blocks. No
// atomics on floats, so every run gives the same bits.
#pragma once

#include "group.cuh"

namespace fastsoftloss {
namespace cuda {

template <class T>
FSL_DEVICE T warp_sum(T v) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// Sums over a block of up to 8 warps, for its first thread; once in a kernel.
template <int N, class T>
FSL_DEVICE void block_sum(T (&v)[N]) {
  __shared__ T warps[N][8];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) warps[i][threadIdx.x / 32] = v[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < blockDim.x / 32; ++w) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += warps[i][w];
  }
}

// The terms of `partial` and what the mean divides them by, by all threads of one block.
template <class T>
FSL_DEVICE void write_total(const Job<T>& job, int blocks) {
  T sums[4] = {0, 0, 0, 0};  // loss, weight, cross-entropy, diversity
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < 2 || job.parts) sums[j] += __ldcg(job.partial + int64_t(j) * blocks + i);
  }
  block_sum(sums);
  if (threadIdx.x != 0) return;
  const T divisor = job.mean ? sums[1] : T(1);
  *job.loss = sums[0] / divisor;
  if (job.parts) job.loss_parts[0] = sums[2] / divisor, job.loss_parts[1] = sums[3] / divisor;
  if (job.divisor) *job.divisor = divisor;
}

template <class T>
__global__ void __launch_bounds__(256) total(const __grid_constant__ Job<T> job, int blocks) {
  write_total(job, blocks);
}

// What the mean divides by, where it has to be known before the first gradient is written: its terms. share(r): row r's.
template <class T, class F>
FSL_DEVICE void write_shares(const Job<T>& job, T* shares, F share) {
  T sum[1] = {0};
#pragma unroll 1  // the trip count would be a division
  for (int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < job.rows; r += int64_t(gridDim.x) * blockDim.x) sum[0] += share(r);
  block_sum(sum);
  if (threadIdx.x != 0) return;
  shares[blockIdx.x] = sum[0];
  if (blockIdx.x == 0) *job.counter = 0;
}

// The labels are kept where there is a place, so that they need not be read once more.
template <bool kMixed, class T>
__global__ void __launch_bounds__(256) divisors(const __grid_constant__ Job<T> job, T* shares, int16_t* labels) {
  write_shares(job, shares, [&](int64_t r) {
    const Labels<kMixed> row = labels_of<kMixed>(job, r);
    if (labels) labels[r] = int16_t(row.label);
    return row.counts() ? Weights<T, kMixed>(job, r, row).share() : T(0);
  });
}

// Of rows without labels, which count for their sample weight.
template <class T>
__global__ void __launch_bounds__(256) sample_weights(const __grid_constant__ Job<T> job, T* shares) {
  write_shares(job, shares, [&](int64_t r) { return sample_weight_of(job, r); });
}

// What a thread's rows add up to.
template <class T>
struct Tally {
  T loss, weight, cross_entropy, diversity;

  // By one thread of those that share row r, which counts for `share`.
  FSL_DEVICE void add(const Job<T>& job, int64_t r, T share, const RowLoss<T>& out) {
    if (job.row_loss) {
      job.row_loss[r] = out.loss;
    } else {
      loss += out.loss, weight += share;
    }
    if (!job.parts) return;
    if (job.row_loss) {
      job.row_parts[r] = out.cross_entropy, job.row_parts[job.rows + r] = out.diversity;
    } else {
      cross_entropy += out.cross_entropy, diversity += out.diversity;
    }
  }
  // By all threads of the block, once; the last block to come here writes the total if it is to.
  FSL_DEVICE void close(const Job<T>& job) const {
    if (!job.partial) return;
    T sums[4] = {loss, weight, cross_entropy, diversity};
    if (job.parts) {
      block_sum(sums);
    } else {
      T two[2] = {loss, weight};
      block_sum(two);
      sums[0] = two[0], sums[1] = two[1];
    }
    __shared__ bool last;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < 2 || job.parts) job.partial[int64_t(j) * gridDim.x + blockIdx.x] = sums[j];
      if (job.counter) {
        __threadfence();  // the sums, before this block is counted
        last = atomicAdd(job.counter, 1) == gridDim.x - 1;
        __threadfence();
      }
    }
    if (!job.counter) return;
    __syncthreads();
    if (last) write_total(job, gridDim.x);
  }
};

// Whether the gradient that the forward wrote stands as it is: the question is asked here, so that no host waits for it.
template <class T>
FSL_DEVICE bool settled(const Job<T>& job) {
  return job.rescale && *job.one_upstream == T(1);
}
// And of one row.
template <class T, class R>
FSL_DEVICE bool settled(const Job<T>& job, const R& row) {
  return job.rescale_rows && row.upstream == T(1);
}

// What all gradients are multiplied by: the upstream gradient where it is one, over the mean's divisor. By all threads of a
// block, once; one of them divides for all.
template <class T>
FSL_DEVICE const T& scale_of_all(const Job<T>& job) {
  __shared__ T scale;
  if (threadIdx.x < 32) {
    T divisor = 1;  // a forward without gradient divides at the end
    if (job.shares) {
      T sum = 0;
      for (int i = threadIdx.x; i < job.share_count; i += 32) sum += job.shares[i];
      divisor = warp_sum(sum);
    } else if (job.one_upstream && job.mean) {
      divisor = *job.divisor;
    }
    if (threadIdx.x == 0) scale = (job.one_upstream ? *job.one_upstream : T(1)) / divisor;
  }
  __syncthreads();
  return scale;
}

}  // namespace cuda
}  // namespace fastsoftloss
