// What a bucket is measured by, the grid that comes of it, and the shift of its codes.
#pragma once

#include "common/grid.h"
#include "common/half.h"
#include "common/philox.h"
#include "common/rounding.h"
#include "cuda/jobs.h"
#include "cuda/memory.h"
#include "cuda/run.h"
#include "cuda/warp.h"

namespace qsdp {

// Least and greatest value, and whether there is a zero, or a value that is not finite.
struct Extent {
    static constexpr uint32_t kZero = 1, kBroken = 2;
    float low, high;
    uint32_t flags;

    QSDP_MEMBER void merge(const Extent& other) {
        low = fminf(other.low, low);
        high = fmaxf(other.high, high);
        flags |= other.flags;
    }
    QSDP_MEMBER bool has_zero() const { return (flags & kZero) != 0; }
    QSDP_MEMBER bool is_broken() const { return (flags & kBroken) != 0; }
};

QSDP_INLINE Extent nothing() {
    return {bits_float(0x7F800000u), bits_float(0xFF800000u), 0u};
}

// ``SkipZeros`` leaves zeros out of low and high; without it they are wrong if there are zeros.
template <bool SkipZeros>
QSDP_INLINE void measure(const Run& run, Extent& extent) {
    float products = 0.0f;  // with zero: NaN where a value is not finite
    bool has_zero = false;
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const float x = run.x[i];
        const bool is_zero = x == 0.0f;
        has_zero |= is_zero;
        products = fmaf(x, 0.0f, products);
        if (SkipZeros && is_zero) continue;
        extent.low = fminf(x, extent.low);
        extent.high = fmaxf(x, extent.high);
    }
    extent.flags |= (has_zero ? Extent::kZero : 0u) | (products != products ? Extent::kBroken : 0u);
}

QSDP_INLINE void store_grid(uint8_t* to, Grid grid) {
    store_item(to, float_bits(grid.low));
    store_item(to + 4, float_bits(grid.scale));
}

QSDP_INLINE Grid grid_of(const Extent& extent, int bits) {
    Grid grid = make_grid(extent.low, extent.high, extent.has_zero(), extent.is_broken(), bits);
    if (extent.is_broken()) grid.low = bits_float(0x7FC00000u);
    return grid;
}

// Half word ``index`` % 8, chosen: an index into registers would put them into memory.
QSDP_INLINE uint32_t half_of(const PhiloxBlock& block, uint32_t index) {
    const uint32_t low = index & 2 ? block.word[1] : block.word[0];
    const uint32_t high = index & 2 ? block.word[3] : block.word[2];
    return (index & 4 ? high : low) >> (index & 1) * 16 & 0xFFFFu;
}

// The shift of ``bucket``, from the block of eight buckets that ``block`` holds; 0 for a rounding
// that is not ``one``.
struct Shifts {
    int64_t number;
    PhiloxBlock block;

    template <bool (*one)(int64_t)>
    QSDP_MEMBER float at(const Item& item, uint64_t key, int64_t bucket) {
        if (!is_one<one>(item.rounding)) return 0.0f;
        if (bucket / kRun != number) {
            number = bucket / kRun;
            block = philox({key, item.parameter, item.group}, static_cast<uint64_t>(number));
        }
        return centred(half_of(block, static_cast<uint32_t>(bucket)));
    }
};

}  // namespace qsdp
