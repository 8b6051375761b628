// What the kernels offer to register.cpp. Pointers are the GPU's; nothing waits for it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/magnitude.h"
#include "common/rotation.h"
#include "common/segment.h"
#include "common/span.h"
#include "cuda/apply_changes.h"
#include "cuda/changes_job.h"
#include "cuda/encode_changes.h"

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

// How many numbers ``starts`` below has room for.
int64_t num_starts(const std::vector<Span>& spans);

// ``starts``: room for what the kernels count on the way.
void compact_on_gpu(const std::vector<Span>& spans, const uint8_t* dense, const uint8_t* bitmap,
                    uint8_t* out, int64_t* starts, bool strict, cudaStream_t stream);

void expand_on_gpu(const std::vector<Span>& spans, const uint8_t* values, const uint8_t* bitmap,
                   uint8_t* out, int64_t* starts, cudaStream_t stream);

void rotate_on_gpu(const std::vector<RotatedStretch>& stretches, uint8_t* buffer,
                   cudaStream_t stream);

// What they come to is in the report of the job's board.
void encode_changes_on_gpu(const ChangesPlan& plan, const EncodeChanges& job, cudaStream_t stream);

void apply_changes_on_gpu(const ChangesPlan& plan, const ApplyChanges& job, cudaStream_t stream);

}  // namespace qsdp
