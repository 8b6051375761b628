// Rotation of gradients on a GPU: one launch for all stretches, a warp a unit.
#include "cuda/rotate.h"

#include "cuda/launch.h"

namespace qsdp {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ RotationJob job) {
    rotate_unit(job, (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp);
}

}  // namespace

void rotate_on_gpu(const std::vector<RotatedStretch>& stretches, uint8_t* buffer,
                   cudaStream_t stream) {
    launch_stretches(stretches, buffer, [=](const RotationJob& job) {
        constexpr int64_t kWarps = kThreads / kWarp;
        const auto blocks = static_cast<unsigned>((job.num_units + kWarps - 1) / kWarps);
        rotate_kernel<<<blocks, kThreads, 0, stream>>>(job);
    });
}

}  // namespace qsdp
