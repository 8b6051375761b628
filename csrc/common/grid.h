// A bucket's grid; see [Note: Grid] in qsdp/ops/reference/codec.py, which this follows operation by
// operation.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/portable.h"

namespace qsdp {

// What travels: least value and step. The scale's sign bit says that the last code is +0.0.
struct Grid {
    float low, scale;
};

// What the bucket's arithmetic uses: huge buckets are worked on scaled by ``factor`` = 2**-8.
struct WorkingGrid {
    float factor, low, step;
};

// ``low`` and ``high`` are over non-zero values; a bucket of zeros alone has low > high.
QSDP_INLINE Grid make_grid(float low, float high, bool has_zero, bool broken, int bits) {
    if (broken) return {NAN, 0.0f};
    if (low > high) low = high = 0.0f;
    const float steps = static_cast<float>((1 << bits) - (has_zero ? 2 : 1));
    float step = high / steps - low / steps;
    if (step < FLT_MIN) step = 0.0f;
    return {low, has_zero ? -step : step};
}

QSDP_INLINE WorkingGrid working_grid(Grid grid) {
    const float step = fabsf(grid.scale);
    const bool huge = fabsf(grid.low) > 0x1p120f || step > 0x1p112f;
    const float factor = huge ? 0x1p-8f : 1.0f;
    return {factor, grid.low * factor, step * factor};
}

// Whether a segment's learned levels serve the bucket; both sides decide by the metadata alone.
QSDP_INLINE bool has_learned_levels(Grid grid) {
    return grid.scale > 0.0f && working_grid(grid).factor == 1.0f;
}

QSDP_INLINE float inverse_step(WorkingGrid grid) {
    return grid.step == 0.0f ? 0.0f : 1.0f / grid.step;
}

}  // namespace qsdp
