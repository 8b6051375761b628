// What a call of the codec works through: parts, each of which codes one payload by one of the
// tables. A call of encode or decode is one of one part.
#pragma once

#include <cstdint>
#include <vector>

#include "common/segment.h"

namespace qsdp {

// One row of the parts; see `Part` in qsdp/codec/segment_table.py for the columns.
struct Part {
    int64_t key;      // folded
    int64_t table;    // which table
    int64_t buffer;   // which row of the buffers
    int64_t payload;  // which row of the payloads
    int64_t add;      // decode: 1 adds to what is there, 0 overwrites
};

constexpr int64_t kPartFields = sizeof(Part) / sizeof(int64_t);

struct SegmentTable {
    std::vector<Segment> segments;
    int64_t numel = 0, padded = 0;  // values of all segments
    bool is_fp32 = true;            // whether all are so in the buffer
};

struct CodecCall {
    std::vector<SegmentTable> tables;  // maybe more than the parts name: it never shrinks
    std::vector<Part> parts;
    int64_t buffer_bytes = 0, payload_bytes = 0;  // of a row
    const float* levels = nullptr;  // the host's: what segments' ``levels`` point into
};

}  // namespace qsdp
