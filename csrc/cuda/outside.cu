// Targets out of range, for FASTSOFTLOSS_CHECK=1: elsewhere such a row is NaN, which needs no synchronisation.
#include "cross_entropy.h"

namespace fastsoftloss {
namespace cuda {

template <bool kMixed>
__global__ void outside(const __grid_constant__ Job<float> job, unsigned long long* first) {
  for (int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < job.rows; r += int64_t(gridDim.x) * blockDim.x)
    if (labels_of<kMixed>(job, r).label == kOutside) atomicMin(first, static_cast<unsigned long long>(r));
}

cudaError_t find_outside(const Job<float>& job, unsigned long long* row, cudaStream_t stream) {
  const auto kernel = job.form == Form::mixture ? outside<true> : outside<false>;
  kernel<<<unsigned(at_most(divide_up(job.rows, 256), 4096)), 256, 0, stream>>>(job, row);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastsoftloss
