// From a plan to kernels: the one place where template arguments are chosen.
#pragma once

#include "cross_entropy.h"
#include "probabilities.cuh"
#include "resident.cuh"
#include "stream.cuh"
#include "tile.cuh"

namespace fastsoftloss {
namespace cuda {

// The least of the compiled sets of moments that has all of `needs`. For mixtures there are but two: an addition or two a
// logit is no reason for a longer build.
template <bool kMixed, class F>
void with_needs(unsigned needs, F f) {
  constexpr unsigned kExponentials = kSquares | kEntropy;
  if constexpr (!kMixed) {
    if (needs == kBase) return f(std::integral_constant<unsigned, kBase>());
    if (needs != 0 && (needs & ~kExponentials) == 0) return f(std::integral_constant<unsigned, kExponentials>());
  }
  if ((needs & kExponentials) == 0) return f(std::integral_constant<unsigned, kLogits>());
  f(std::integral_constant<unsigned, kLogits | kExponentials>());
}

template <Storage S, unsigned Needs, bool kStaged, bool kMixed>
void launch_tile(const Job<float>& job, const Plan& p, cudaStream_t stream) {
  const auto kernel = p.lanes == 1 ? tile<S, Needs, kStaged, true, kMixed> : tile<S, Needs, kStaged, false, kMixed>;
  const int in_twos = kStaged && Memory<S>::kBytes == 2 && job.classes % 2 == 0;
  kernel<<<unsigned(p.blocks), p.threads, p.shared, stream>>>(job, p.lanes, p.tile_rows, in_twos);
}

template <Storage S, Diversity D, class T>
void launch_probabilities(const Job<T>& job, const Plan& p, cudaStream_t stream) {
  const int shared = p.threads / p.lanes * int(sizeof(Expectation<T>));
  if constexpr (S != Storage::float64)
    if (p.kernel == Kernel::probabilities_held)
      return probabilities<S, D, true><<<unsigned(p.blocks), p.threads, shared, stream>>>(job, p.lanes);
  probabilities<S, D, false><<<unsigned(p.blocks), p.threads, shared, stream>>>(job, p.lanes);
}
template <Storage S, class T>
void launch_probabilities(const Job<T>& job, const Plan& p, cudaStream_t stream) {
  switch (job.options.diversity) {
    case Diversity::logit_variance:
      return launch_probabilities<S, Diversity::logit_variance>(job, p, stream);
    case Diversity::kl:
      return launch_probabilities<S, Diversity::kl>(job, p, stream);
    case Diversity::reverse_kl:
      return launch_probabilities<S, Diversity::reverse_kl>(job, p, stream);
    case Diversity::chi2:
      return launch_probabilities<S, Diversity::chi2>(job, p, stream);
    case Diversity::variance:
      return launch_probabilities<S, Diversity::variance>(job, p, stream);
    default:
      return launch_probabilities<S, Diversity::none>(job, p, stream);
  }
}

// The kernel that takes rows from logits to losses, and to the gradient where the job has a place for it.
template <Storage S, bool kMixed, class T>
void launch_rows(const Job<T>& job, const Plan& p, cudaStream_t stream) {
  if constexpr (!kMixed)
    if (job.form == Form::probabilities) return launch_probabilities<S>(job, p, stream);
  if constexpr (S != Storage::float64) {
    const unsigned needs = moments_of(job.options) & ~unsigned(kWeighted);
    switch (p.kernel) {
      case Kernel::tile_staged:
        return with_needs<kMixed>(needs, [&](auto n) { launch_tile<S, n.value, true, kMixed>(job, p, stream); });
      case Kernel::tile_direct:
        return with_needs<kMixed>(needs, [&](auto n) { launch_tile<S, n.value, false, kMixed>(job, p, stream); });
      case Kernel::resident:
        return with_needs<kMixed>(needs, [&](auto n) {
          if (job.gradient.data) {
            resident<S, n.value, true, kMixed><<<unsigned(p.blocks), p.threads, 0, stream>>>(job, p.lanes);
          } else {
            resident<S, n.value, false, kMixed><<<unsigned(p.blocks), p.threads, 0, stream>>>(job, p.lanes);
          }
        });
      case Kernel::stream:
        return with_needs<kMixed>(
            needs, [&](auto n) { reduce<S, n.value, kMixed><<<dim3(unsigned(p.blocks), p.splits), p.threads, 0, stream>>>(job, p.lanes); });
      default:
        break;
    }
  }
  careful_rows<S, kMixed><<<unsigned(p.blocks), p.threads, 0, stream>>>(job, p.lanes);
}

template <Storage S, bool kMixed, class T>
cudaError_t forward_of(Job<T> job, const Plan& p, cudaStream_t stream) {
  const bool reduced = job.partial != nullptr;
  if constexpr (S != Storage::float64) {
    if (p.splits > 1) {
      job.splits = p.splits;
      if (!reduced) job.counter = nullptr;
      launch_rows<S, kMixed>(job, p, stream);
      merge_parts<S, kMixed><<<unsigned(p.merge_blocks), 256, 0, stream>>>(job);
      return cudaGetLastError();
    }
  }
  if (reduced && job.mean && job.gradient.data) {
    // the divisor comes first, since every gradient wants it; then the last block to finish writes the total
    job.share_count = share_count(job.rows);
    if (job.form == Form::probabilities) {
      sample_weights<<<job.share_count, 256, 0, stream>>>(job, const_cast<T*>(job.shares));
    } else {
      divisors<kMixed><<<job.share_count, 256, 0, stream>>>(job, const_cast<T*>(job.shares), const_cast<int16_t*>(job.labels));
    }
    launch_rows<S, kMixed>(job, p, stream);
  } else {
    job.counter = nullptr, job.shares = nullptr, job.labels = nullptr;  // an empty gradient has no address either
    launch_rows<S, kMixed>(job, p, stream);
    if (reduced) total<<<1, 256, 0, stream>>>(job, int(p.blocks));
  }
  return cudaGetLastError();
}

template <Storage S, bool kMixed, class T>
cudaError_t backward_of(Job<T> job, const Plan& p, cudaStream_t stream) {
  job.counter = nullptr, job.shares = nullptr;
  if constexpr (S != Storage::float64) {
    if (p.kernel == Kernel::stream) {
      with_needs<kMixed>(moments_of(job.options), [&](auto n) {
        spread<S, n.value, kMixed><<<dim3(unsigned(p.spread_blocks), p.spread_splits), p.threads, 0, stream>>>(job);
      });
      return cudaGetLastError();
    }
  }
  job.saved = nullptr;
  launch_rows<S, kMixed>(job, p, stream);
  return cudaGetLastError();
}

template <Storage S, class T>
cudaError_t forward(Job<T> job, const Plan& p, cudaStream_t stream) {
  return job.form == Form::mixture ? forward_of<S, true>(job, p, stream) : forward_of<S, false>(job, p, stream);
}
template <Storage S, class T>
cudaError_t backward(Job<T> job, const Plan& p, cudaStream_t stream) {
  return job.form == Form::mixture ? backward_of<S, true>(job, p, stream) : backward_of<S, false>(job, p, stream);
}

}  // namespace cuda
}  // namespace fastsoftloss
