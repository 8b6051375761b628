// Kernel signatures. Kernels know no tensors: pointers, a table, a key, a range.
#pragma once

#include <cstdint>

#include "common/magnitude.h"
#include "common/segment.h"

namespace qsdp {

struct Table {
    const Segment* segments;
    int64_t num_segments;
    uint64_t key;
    const float* levels;  // what the segments' ``levels`` point into
};

// encode and decode work on the values [begin, end) of the table's segments laid end to end, so
// that a call can be split between threads: a bucket belongs to the range that its first value lies
// in. encode counts ``numel`` values a segment, decode ``padded`` ones (padding becomes zero, or
// stays if add).
struct Kernels {
    const char* name;
    void (*encode)(const Table& table, const uint8_t* buffer, uint8_t* payload, int64_t begin,
                   int64_t end);
    void (*decode)(const Table& table, const uint8_t* payload, uint8_t* buffer, bool add,
                   int64_t begin, int64_t end);
    void (*count_digits)(KeyType type, const void* values, int64_t begin, int64_t end,
                         int64_t prefix, int shift, int width, int64_t* counts);
    void (*mark_above)(KeyType type, const void* values, int64_t begin, int64_t end, int64_t key,
                       uint8_t* out);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace qsdp
