// What encoding and decoding know of a bucket.
#pragma once

#include <cstdint>

#include "common/grid.h"
#include "common/philox.h"
#include "common/segment.h"
#include "cpu/levels-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// How many values are held as one code a byte before they are packed.
constexpr int64_t kChunk = 1024;
static_assert(kChunk % kBlock == 0);

// kPlain: neither zeros nor huge values in the bucket. kZeros: zeros. kFull: huge, perhaps zeros.
// kLevels: learned levels serve it.
enum class Mode { kPlain, kZeros, kFull, kLevels };

struct Work {
    WorkingGrid grid;
    float r;        // the bucket's shift
    Stream stream;  // of the values' own numbers
    uint64_t base;  // their first block
    int num_codes;  // 2**bits
    bool has_zero;
    int64_t ahead_bytes;   // how far to fetch ahead: the next bucket is measured next
    const Levels* levels;  // of Mode::kLevels
};

// From the least value to the greatest, where there are no zeros.
QSDP_INLINE float width_of(const Work& work) {
    return work.grid.step * static_cast<float>(work.num_codes - 1);
}

using Quantize = void (*)(const uint8_t*, int64_t, const Work&, int64_t, uint8_t*);

QSDP_INLINE Mode mode_of(const WorkingGrid& grid, bool has_zero) {
    if (grid.factor != 1.0f) return Mode::kFull;
    return has_zero ? Mode::kZeros : Mode::kPlain;
}

// How many buckets have their first value before value ``end``.
QSDP_INLINE int64_t buckets_before(const Segment& segment, int64_t end) {
    return end / segment.bucket + (end % segment.bucket != 0);
}

QSDP_INLINE Stream stream_of(const Segment& segment, uint64_t key) {
    return {key, static_cast<uint32_t>(segment.parameter), static_cast<uint32_t>(segment.group)};
}

// The first block of the numbers that values draw on a grid that is kept from ``epoch`` on.
QSDP_INLINE uint64_t base_of(int32_t epoch) {
    return uint64_t{static_cast<uint32_t>(epoch)} << 32;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
