#include "launch.cuh"

namespace fastsoftloss {
namespace cuda {
template cudaError_t forward<Storage::float64, double>(Job<double>, const Plan&, cudaStream_t);
template cudaError_t backward<Storage::float64, double>(Job<double>, const Plan&, cudaStream_t);
}  // namespace cuda
}  // namespace fastsoftloss
