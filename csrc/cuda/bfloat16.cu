#include "launch.cuh"

namespace fastsoftloss {
namespace cuda {
template cudaError_t forward<Storage::bfloat16, float>(Job<float>, const Plan&, cudaStream_t);
template cudaError_t backward<Storage::bfloat16, float>(Job<float>, const Plan&, cudaStream_t);
}  // namespace cuda
}  // namespace fastsoftloss
