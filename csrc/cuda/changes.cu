// Changes of kept rows on a GPU: a few launches for all segments of a group.
#include "cuda/changes_job.h"

#include "cuda/apply_changes.h"
#include "cuda/encode_changes.h"
#include "cuda/launch.h"

namespace qsdp {
namespace {

constexpr int kThreads = 128;

QSDP_INLINE int64_t warp_number() {
    return (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
}

unsigned num_blocks(const ChangesBoard& board) {
    constexpr int64_t kWarps = kThreads / kWarp;
    return static_cast<unsigned>((board.num_units + kWarps - 1) / kWarps);
}

__global__ void __launch_bounds__(kWarp)
    deliver_kernel(const __grid_constant__ ChangesDelivery delivery) {
    take_delivery(delivery);
}

__global__ void __launch_bounds__(kThreads) say_kernel(const __grid_constant__ EncodeChanges job) {
    say_unit(job, warp_number());
}

__global__ void __launch_bounds__(kWarp)
    place_said_kernel(const __grid_constant__ EncodeChanges job) {
    place_said(job);
}

__global__ void __launch_bounds__(kThreads) join_kernel(const __grid_constant__ EncodeChanges job) {
    join_unit(job, warp_number());
}

__global__ void __launch_bounds__(kWarp)
    place_frame_kernel(const __grid_constant__ ApplyChanges job) {
    place_frame(job);
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ ApplyChanges job) {
    count_data(job, warp_number());
}

__global__ void __launch_bounds__(kWarp) start_kernel(const __grid_constant__ ApplyChanges job) {
    start_data(job);
}

__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ ApplyChanges job) {
    apply_unit(job, warp_number());
}

void deliver_on_gpu(const ChangesPlan& plan, const ChangesBoard& board, cudaStream_t stream) {
    deliver(plan.items, board, [=](const ChangesDelivery& delivery) {
        deliver_kernel<<<1, kWarp, 0, stream>>>(delivery);
    });
}

}  // namespace

void encode_changes_on_gpu(const ChangesPlan& plan, const EncodeChanges& job, cudaStream_t stream) {
    const unsigned blocks = num_blocks(job.board);
    deliver_on_gpu(plan, job.board, stream);
    if (blocks > 0) say_kernel<<<blocks, kThreads, 0, stream>>>(job);
    place_said_kernel<<<1, kWarp, 0, stream>>>(job);
    if (blocks > 0) join_kernel<<<blocks, kThreads, 0, stream>>>(job);
}

void apply_changes_on_gpu(const ChangesPlan& plan, const ApplyChanges& job, cudaStream_t stream) {
    const unsigned blocks = num_blocks(job.board);
    deliver_on_gpu(plan, job.board, stream);
    place_frame_kernel<<<1, kWarp, 0, stream>>>(job);
    if (blocks > 0) count_kernel<<<blocks, kThreads, 0, stream>>>(job);
    start_kernel<<<1, kWarp, 0, stream>>>(job);
    if (blocks > 0) apply_kernel<<<blocks, kThreads, 0, stream>>>(job);
}

}  // namespace qsdp
