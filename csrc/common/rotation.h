// What is rotated of a buffer, block by block; see qsdp/ops/reference/rotation.py for the
// specification and `RotatedStretch` there for the columns.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/portable.h"

namespace qsdp {

struct RotatedStretch {
    int64_t byte;
    int64_t numel;
    int64_t bucket;  // values, a multiple of 8
    int64_t dtype;   // not opaque
};

constexpr int64_t kStretchFields = sizeof(RotatedStretch) / sizeof(int64_t);
constexpr int kMostBlock = 256;  // values of the largest block

// The size of the block that value ``i`` of a bucket's last ``count`` values lies in, where these
// are at most kMostBlock: the highest bit in which the two differ.
QSDP_INLINE constexpr int block_size_of(int count, int i) {
    int size = 1;
    while (size * 2 <= (count ^ i)) size *= 2;
    return size;
}

// Whether value ``i`` of a block changes its sign.
QSDP_INLINE constexpr uint32_t is_negated(uint32_t i) {
    uint32_t pairs = i & i >> 1;
    pairs ^= pairs >> 4;
    pairs ^= pairs >> 2;
    pairs ^= pairs >> 1;
    return pairs & 1u;
}
static_assert(kMostBlock <= 256, "more bits would have to be folded");

// The fp32 next to 1 / sqrt(size).
QSDP_INLINE float block_scale(int size) {
    uint32_t log2 = 0;
    for (; size > 1; size /= 2) ++log2;
    return bits_float((127u - (log2 + 1) / 2) << 23 | (log2 % 2 ? 0x3504F3u : 0u));
}

}  // namespace qsdp
