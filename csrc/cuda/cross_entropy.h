// The host's side of the kernels: a job and its plan in, launches out. No synchronisation; two launches forward at most,
// one backward.
#pragma once

#include <cuda_runtime_api.h>

#include "job.h"
#include "plan.h"

namespace fastsoftloss {
namespace cuda {

// job.partial is set where there is a reduction, job.gradient where the gradient is wanted in the same pass.
template <Storage S, class T>
cudaError_t forward(Job<T> job, const Plan& plan, cudaStream_t stream);

// job.upstream is set; with job.rescale, rows whose upstream gradient is 1 are left as they are.
template <Storage S, class T>
cudaError_t backward(Job<T> job, const Plan& plan, cudaStream_t stream);

// The first row whose target is neither a class nor ignored goes to *row, which holds `rows` before.
cudaError_t find_outside(const Job<float>& job, unsigned long long* row, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastsoftloss
