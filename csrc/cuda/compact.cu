// Compact and expand on a GPU: three launches for all spans, whatever their number.
#include "cuda/compact.h"

#include "cuda/launch.h"

namespace qsdp {
namespace {

constexpr int kThreads = 256;

QSDP_INLINE int64_t warp_number() {
    return (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ SpanJob job) {
    count_unit(job, warp_number());
}

__global__ void __launch_bounds__(kThreads) start_kernel(const __grid_constant__ SpanJob job) {
    start_units(job, warp_number());
}

template <bool Compact>
__global__ void __launch_bounds__(kThreads) move_kernel(const __grid_constant__ SpanJob job) {
    move_unit<Compact>(job, warp_number());
}

unsigned num_blocks(int64_t warps) {
    constexpr int64_t kWarps = kThreads / kWarp;
    return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

template <bool Compact>
void move_on_gpu(const std::vector<Span>& spans, const uint8_t* from, const uint8_t* bitmap,
                 uint8_t* to, int64_t* starts, bool strict, cudaStream_t stream) {
    launch_spans(spans, from, bitmap, to, starts, strict, [=](const SpanJob& job) {
        count_kernel<<<num_blocks(job.num_units), kThreads, 0, stream>>>(job);
        start_kernel<<<num_blocks(job.num_spans), kThreads, 0, stream>>>(job);
        move_kernel<Compact><<<num_blocks(job.num_units), kThreads, 0, stream>>>(job);
    });
}

}  // namespace

int64_t num_starts(const std::vector<Span>& spans) {
    return num_units(spans);
}

void compact_on_gpu(const std::vector<Span>& spans, const uint8_t* dense, const uint8_t* bitmap,
                    uint8_t* out, int64_t* starts, bool strict, cudaStream_t stream) {
    move_on_gpu<true>(spans, dense, bitmap, out, starts, strict, stream);
}

void expand_on_gpu(const std::vector<Span>& spans, const uint8_t* values, const uint8_t* bitmap,
                   uint8_t* out, int64_t* starts, cudaStream_t stream) {
    move_on_gpu<false>(spans, values, bitmap, out, starts, false, stream);
}

}  // namespace qsdp
