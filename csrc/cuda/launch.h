// What csrc/cuda offers to csrc/register_cuda.cpp. Pointers are the GPU's; nothing waits for it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "segment.h"

namespace qsdp {

// ``levels``: the host's.
void encode_on_gpu(const std::vector<Segment>& segments, uint64_t key, const int64_t* header,
                   const float* levels, const uint8_t* buffer, uint8_t* payload,
                   int64_t payload_bytes, cudaStream_t stream);

void decode_on_gpu(const std::vector<Segment>& segments, uint64_t key, const float* levels,
                   const uint8_t* payload, uint8_t* buffer, bool add, cudaStream_t stream);

void count_digits_on_gpu(KeyType type, const void* values, int64_t num_values,
                         const int64_t* prefix, int shift, int width, int64_t* counts,
                         cudaStream_t stream);

void mark_above_on_gpu(KeyType type, const void* values, int64_t num_values, int64_t key,
                       uint8_t* out, cudaStream_t stream);

}  // namespace qsdp
