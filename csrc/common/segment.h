// One row of the codec's segment table; see `Field` in qsdp/codec/payload.py for the columns.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace qsdp {

enum DType : int64_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kOpaque = 3 };

enum Rounding : int64_t { kShift = 0, kDither = 1, kStochastic = 2, kNearest = 3 };

struct Segment {
    int64_t bits;         // 2 to 8: coded; 0: raw
    int64_t dtype;        // of the flat buffer's elements
    int64_t wire;         // dtype of a raw segment on the wire
    int64_t buffer_byte;  // where the segment starts in the flat buffer
    int64_t numel;        // valid values
    int64_t padded;       // values that the buffer reserves
    int64_t bucket;       // values a bucket, a multiple of 8
    int64_t rounding;
    int64_t meta_byte;  // where the bucket metadata starts in the payload
    int64_t data_byte;  // where codes or raw values start in the payload
    int64_t parameter;  // third counter word of the generator
    int64_t group;      // fourth counter word of the generator
    int64_t levels;     // where its 2**bits learned levels start, in floats; -1: a uniform grid
};

constexpr int64_t kSegmentFields = sizeof(Segment) / sizeof(int64_t);
constexpr int64_t kHeaderBytes = 32;
constexpr int64_t kMetaBytes = 8;
constexpr int64_t kLeastLearnedBits = 2, kMostLearnedBits = 6;

QSDP_INLINE int64_t item_bytes(int64_t dtype) {
    return dtype == kFp32 ? 4 : dtype == kOpaque ? 1 : 2;
}

QSDP_INLINE int64_t num_buckets(const Segment& segment) {
    return segment.numel / segment.bucket + (segment.numel % segment.bucket != 0);
}

QSDP_INLINE int64_t data_bytes(const Segment& segment) {
    if (segment.bits == 0) return segment.numel * item_bytes(segment.wire);
    return (segment.numel * segment.bits + 7) / 8;
}

}  // namespace qsdp
