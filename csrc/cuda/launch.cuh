// From a plan to kernels: the one place where template arguments are chosen.
#pragma once

#include "cross_entropy.h"
#include "resident.cuh"
#include "stream.cuh"
#include "tile.cuh"

namespace fastsoftloss {
namespace cuda {

// The least of the compiled sets of moments that has all of `needs`.
template <class F>
void with_needs(unsigned needs, F f) {
  constexpr unsigned kExponentials = kSquares | kEntropy;
  if (needs == kBase) return f(std::integral_constant<unsigned, kBase>());
  if (needs == kLogits) return f(std::integral_constant<unsigned, kLogits>());
  if ((needs & ~kExponentials) == 0) return f(std::integral_constant<unsigned, kExponentials>());
  f(std::integral_constant<unsigned, kLogits | kExponentials>());
}

template <Storage S, unsigned Needs, bool kStaged>
void launch_tile(const Job<float>& job, const Plan& p, cudaStream_t stream) {
  const auto kernel = p.lanes == 1 ? tile<S, Needs, kStaged, true> : tile<S, Needs, kStaged, false>;
  const int in_twos = kStaged && Memory<S>::kBytes == 2 && job.classes % 2 == 0;
  kernel<<<unsigned(p.blocks), p.threads, p.shared, stream>>>(job, p.lanes, p.tile_rows, in_twos);
}

// The kernel that takes rows from logits to losses, and to the gradient where the job has a place for it.
template <Storage S, class T>
void launch_rows(const Job<T>& job, const Plan& p, cudaStream_t stream) {
  if constexpr (S != Storage::float64) {
    const unsigned needs = moments_of(job.options) & ~unsigned(kWeighted);
    switch (p.kernel) {
      case Kernel::tile_staged:
        return with_needs(needs, [&](auto n) { launch_tile<S, n.value, true>(job, p, stream); });
      case Kernel::tile_direct:
        return with_needs(needs, [&](auto n) { launch_tile<S, n.value, false>(job, p, stream); });
      case Kernel::resident:
        return with_needs(needs, [&](auto n) {
          if (job.gradient.data) {
            resident<S, n.value, true><<<unsigned(p.blocks), p.threads, 0, stream>>>(job, p.lanes);
          } else {
            resident<S, n.value, false><<<unsigned(p.blocks), p.threads, 0, stream>>>(job, p.lanes);
          }
        });
      case Kernel::stream:
        return with_needs(needs,
                          [&](auto n) { reduce<S, n.value><<<dim3(unsigned(p.blocks), p.splits), p.threads, 0, stream>>>(job, p.lanes); });
      default:
        break;
    }
  }
  careful_rows<S><<<unsigned(p.blocks), p.threads, 0, stream>>>(job, p.lanes);
}

template <Storage S, class T>
cudaError_t forward(Job<T> job, const Plan& p, cudaStream_t stream) {
  const bool reduced = job.partial != nullptr;
  if constexpr (S != Storage::float64) {
    if (p.splits > 1) {
      job.splits = p.splits;
      if (!reduced) job.counter = nullptr;
      launch_rows<S>(job, p, stream);
      merge_parts<S><<<unsigned(p.merge_blocks), 256, 0, stream>>>(job);
      return cudaGetLastError();
    }
  }
  if (reduced && job.mean && job.gradient.data) {
    // the divisor comes first, since every gradient wants it; then the last block to finish writes the total
    job.share_count = share_count(job.rows);
    divisors<<<job.share_count, 256, 0, stream>>>(job, const_cast<T*>(job.shares), const_cast<int16_t*>(job.labels));
    launch_rows<S>(job, p, stream);
  } else {
    job.counter = nullptr, job.shares = nullptr, job.labels = nullptr;  // an empty gradient has no address either
    launch_rows<S>(job, p, stream);
    if (reduced) total<<<1, 256, 0, stream>>>(job, int(p.blocks));
  }
  return cudaGetLastError();
}

template <Storage S, class T>
cudaError_t backward(Job<T> job, const Plan& p, cudaStream_t stream) {
  job.counter = nullptr, job.shares = nullptr;
  if constexpr (S != Storage::float64) {
    if (p.kernel == Kernel::stream) {
      with_needs(moments_of(job.options),
                 [&](auto n) { spread<S, n.value><<<dim3(unsigned(p.spread_blocks), p.spread_splits), p.threads, 0, stream>>>(job); });
      return cudaGetLastError();
    }
  }
  job.saved = nullptr;
  launch_rows<S>(job, p, stream);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastsoftloss
