// One row of the codec's segment table; see `Field` in qsdp/codec/segment_table.py for the columns.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/portable.h"

namespace qsdp {

struct Segment {
    int64_t bits;         // 2 to 8: coded; 0: raw
    int64_t dtype;        // DType of the flat buffer's elements
    int64_t wire;         // DType of a raw segment on the wire
    int64_t buffer_byte;  // where the segment starts in the flat buffer
    int64_t numel;        // valid values
    int64_t padded;       // values that the buffer reserves
    int64_t bucket;       // values a bucket, a multiple of 8
    int64_t rounding;     // Rounding
    int64_t meta_byte;    // where the bucket metadata starts in the payload
    int64_t data_byte;    // where codes or raw values start in the payload
    int64_t parameter;    // third counter word of the generator
    int64_t group;        // fourth counter word of the generator
    int64_t levels;       // where its 2**bits learned levels start, in floats; -1: a uniform grid
    int64_t epoch_byte;   // where the buckets' epochs start in the payload; -1: there are none
};

constexpr int64_t kSegmentFields = sizeof(Segment) / sizeof(int64_t);
constexpr int64_t kHeaderBytes = 32;
constexpr int64_t kMetaBytes = 8, kEpochBytes = 4;  // of a bucket
constexpr int64_t kMostKept = 128;                  // values of a bucket that has an epoch
constexpr int64_t kLeastLearnedBits = 2, kMostLearnedBits = 6;

QSDP_INLINE int64_t num_buckets(const Segment& segment) {
    return segment.numel / segment.bucket + (segment.numel % segment.bucket != 0);
}

QSDP_INLINE int64_t data_bytes(const Segment& segment) {
    if (segment.bits == 0) return segment.numel * item_bytes(segment.wire);
    return (segment.numel * segment.bits + 7) / 8;
}

}  // namespace qsdp
