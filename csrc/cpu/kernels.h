// Kernel signatures. Kernels know no tensors: pointers, a table, a key, a range.
#pragma once

#include <cstdint>

#include "common/changes.h"
#include "common/frame_fault.h"
#include "common/magnitude.h"
#include "common/rotation.h"
#include "common/segment.h"

namespace qsdp {

struct Table {
    const Segment* segments;
    int64_t num_segments;
    uint64_t key;
    const float* levels;  // what the segments' ``levels`` point into
};

// What encode_changes is given, besides the table.
struct ChangesCall {
    const uint8_t *buffer, *kept;
    const int64_t* looks;  // a Look a segment
    int32_t step;
    int64_t redraw_every;
    float room, twice_room;
    const PlaceInFrame* places;  // a segment
    uint8_t* frame;
    uint8_t* is_changed;  // a byte a segment, set to 1 where it is
};

// What a range of values came to: the data of its buckets, which follow each other.
struct Changes {
    uint8_t* data;
    int64_t data_bytes, num_changed, num_drawn;
};

// Buckets [first, last) of a segment that a frame has changes of.
struct ChangedBuckets {
    const Segment* segment;
    const uint8_t *counts, *data;  // the segment's counts in a frame; the data of these buckets
    int64_t first, last;
};

// encode and decode work on the values [begin, end) of the table's segments laid end to end, so
// that a call can be split between threads: a bucket belongs to the range that its first value lies
// in. encode counts ``numel`` values a segment, decode ``padded`` ones (padding becomes zero, or
// stays if add). encode_changes counts as encode does; each bucket has its place in the frame, from
// which the caller moves it to where it belongs. rotate takes the values of stretches so.
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
    Changes (*encode_changes)(const Table& table, const ChangesCall& call, int64_t begin,
                              int64_t end);
    Fault (*apply_changes)(const ChangedBuckets& changed, int32_t step, uint8_t* kept);
    void (*rotate)(const RotatedStretch* stretches, int64_t num_stretches, uint8_t* buffer,
                   int64_t begin, int64_t end);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace qsdp
