// Encode and decode on a GPU: one launch for all segments of a group, a warp a unit.
#include "cuda/unit.h"

#include "cuda/launch.h"

namespace qsdp {
namespace {

// Chosen by measurement on an H200: few registers, so that many warps wait for memory at once.
constexpr int kEncodeThreads = 128, kEncodeBlocks = 6;  // a block; blocks an SM
constexpr int kDecodeThreads = 256, kDecodeBlocks = 4;

__global__ void __launch_bounds__(kEncodeThreads, kEncodeBlocks)
    encode_kernel(const __grid_constant__ Job job) {
    run_unit<Turn::kToCodes>(job, (int64_t{blockIdx.x} * kEncodeThreads + threadIdx.x) / kWarp);
}

__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    decode_kernel(const __grid_constant__ Job job) {
    run_unit<Turn::kToValues>(job, (int64_t{blockIdx.x} * kDecodeThreads + threadIdx.x) / kWarp);
}

// Apart, as epochs take registers.
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    decode_kept_kernel(const __grid_constant__ Job job) {
    run_unit<Turn::kKeptToValues>(job,
                                  (int64_t{blockIdx.x} * kDecodeThreads + threadIdx.x) / kWarp);
}

unsigned num_blocks(const Job& job, int threads) {
    const int64_t units = threads / kWarp;
    const int64_t blocks = (job.num_units + units - 1) / units;
    return static_cast<unsigned>(blocks > 0 ? blocks : 1);  // a header alone is work too
}

}  // namespace

void encode_on_gpu(const std::vector<Segment>& segments, uint64_t key, const int64_t* header,
                   const float* levels, const uint8_t* buffer, uint8_t* payload,
                   int64_t payload_bytes, cudaStream_t stream) {
    launch_jobs(
        encode_items(segments, payload_bytes), levels, buffer, payload, key, header, false,
        [=](const Job& job) {
            encode_kernel<<<num_blocks(job, kEncodeThreads), kEncodeThreads, 0, stream>>>(job);
        });
}

void decode_on_gpu(const std::vector<Segment>& segments, uint64_t key, const float* levels,
                   const uint8_t* payload, uint8_t* buffer, bool add, cudaStream_t stream) {
    launch_jobs(
        decode_items(segments, add), levels, payload, buffer, key, nullptr, add,
        [=](const Job& job) {
            decode_kernel<<<num_blocks(job, kDecodeThreads), kDecodeThreads, 0, stream>>>(job);
        });
    const Items kept = kept_items(segments);
    if (kept.all().empty()) return;
    launch_jobs(kept, levels, payload, buffer, key, nullptr, add, [=](const Job& job) {
        decode_kept_kernel<<<num_blocks(job, kDecodeThreads), kDecodeThreads, 0, stream>>>(job);
    });
}

}  // namespace qsdp
