// Encode and decode on a GPU: one launch for all segments of a group, a warp a unit.
#include "codec.h"

#include "launch.h"

namespace qsdp {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 3) encode_kernel(const __grid_constant__ Job job) {
    run_unit<true>(job, (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp);
}

__global__ void __launch_bounds__(kThreads, 3) decode_kernel(const __grid_constant__ Job job) {
    run_unit<false>(job, (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp);
}

unsigned num_blocks(const Job& job) {
    constexpr int64_t kUnits = kThreads / kWarp;
    const int64_t blocks = (job.num_units + kUnits - 1) / kUnits;
    return static_cast<unsigned>(blocks > 0 ? blocks : 1);  // a header alone is work too
}

}  // namespace

void encode_on_gpu(const std::vector<Segment>& segments, uint64_t key, const int64_t* header,
                   const float* levels, const uint8_t* buffer, uint8_t* payload,
                   int64_t payload_bytes, cudaStream_t stream) {
    launch_jobs(
        encode_items(segments, payload_bytes).all(), levels, buffer, payload, key, header, false,
        [=](const Job& job) { encode_kernel<<<num_blocks(job), kThreads, 0, stream>>>(job); });
}

void decode_on_gpu(const std::vector<Segment>& segments, uint64_t key, const float* levels,
                   const uint8_t* payload, uint8_t* buffer, bool add, cudaStream_t stream) {
    launch_jobs(
        decode_items(segments, add).all(), levels, payload, buffer, key, nullptr, add,
        [=](const Job& job) { decode_kernel<<<num_blocks(job), kThreads, 0, stream>>>(job); });
}

}  // namespace qsdp
