// What a call of the codec works through, once it was checked.
#pragma once

#include <cstdint>
#include <vector>

#include "common/segment.h"

namespace qsdp {

// A payload and the slice that it is of; see `Part` in qsdp/codec/payload.py.
struct Part {
    int64_t key;
    int64_t table;    // number of its table
    int64_t buffer;   // row of the buffers
    int64_t payload;  // row of the payloads
    int64_t add;      // 1: decode adds to what is there
};

constexpr int64_t kPartFields = sizeof(Part) / sizeof(int64_t);

struct Call {
    std::vector<Segment> segments;  // of all tables, one after another
    int64_t num_tables = 0;
    int64_t num_segments = 0;  // of each table
    std::vector<Part> parts;
    const float* levels = nullptr;  // what the segments' ``levels`` point into
    int64_t buffer_bytes = 0;       // a row
    int64_t payload_bytes = 0;

    const Segment* table(int64_t number) const { return segments.data() + number * num_segments; }
};

}  // namespace qsdp
