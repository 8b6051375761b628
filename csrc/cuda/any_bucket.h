// Codes of a bucket of any kind: huge, broken or served by learned levels too. The long way of
// [Note: Grid] in qsdp/ops/reference/codec.py, operation by operation.
#pragma once

#include "common/dtype.h"
#include "common/grid.h"
#include "common/philox.h"
#include "common/rounding.h"
#include "cuda/bucket.h"
#include "cuda/jobs.h"
#include "cuda/rounding.h"
#include "cuda/run.h"
#include "cuda/warp.h"

namespace qsdp {

// What the values of a bucket have in common on either side.
struct Coder {
    Grid grid;
    WorkingGrid working;
    float r;  // the bucket's shift
    bool has_zero, is_broken;
    Stream stream;
    const float* levels;  // of a bucket that learned levels serve, or null
    int bits;
    int16_t rounding;
};

QSDP_INLINE Coder make_coder(const Item& item, uint64_t key, const float* levels, Grid grid,
                             bool has_zero, bool is_broken, float shift) {
    Coder coder;
    coder.grid = grid;
    coder.working = working_grid(grid);
    coder.r = shift;
    coder.has_zero = has_zero;
    coder.is_broken = is_broken;
    coder.stream = {key, item.parameter, item.group};
    coder.levels = item.levels >= 0 && has_learned_levels(grid) ? levels + item.levels : nullptr;
    coder.bits = item.bits;
    coder.rounding = item.rounding;
    return coder;
}

QSDP_INLINE uint32_t level_code(const Coder& coder, float t, float u) {
    const int last = (1 << coder.bits) - 1;
    int index = 0;
    for (int step = (last + 1) / 2; step > 0; step /= 2) {
        if (coder.levels[index + step] <= t) index += step;
    }
    const float below = coder.levels[index];
    const float above = coder.levels[index < last ? index + 1 : last];
    const float least = is_one<draws_for_levels>(coder.rounding) ? u * (above - below) : above - t;
    if (least < t - below) ++index;
    return static_cast<uint32_t>(index < last ? index : last);
}

// The codes of a run, as a stream of bits; ``block`` is that of its values' own numbers.
QSDP_INLINE uint64_t encode_run(const Run& run, const Coder& coder, float inverse, uint64_t block) {
    if (coder.is_broken) return 0;
    const bool has_own = is_one<draws_for_values>(coder.rounding);
    PhiloxBlock own{};
    if (has_own) own = philox(coder.stream, block);
    const uint32_t last = (1u << coder.bits) - 1;
    const float steps = static_cast<float>(last - coder.has_zero);
    uint32_t codes[kRun];
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const float x = run.x[i];
        float t = (x * coder.working.factor - coder.working.low) * inverse;
        const float r = has_own ? number_of(coder.rounding, own, i) : coder.r;
        if (coder.levels != nullptr) {
            codes[i] = level_code(coder, t, r + 0.5f);
            continue;
        }
        // Rounding is monotone and keeps whole numbers, so saturating first is the same.
        t = fminf(fmaxf(before_rounding(coder.rounding, t, r), 0.0f), steps);
        codes[i] = round_to_code(coder.rounding, t);
        if (coder.has_zero && x == 0.0f) codes[i] = last;
    }
    const uint32_t base = 1u << coder.bits;
    uint32_t half[2];
    QSDP_UNROLL(8)
    for (int h = 0; h < 2; ++h) {
        const uint32_t* four = codes + 4 * h;
        half[h] = ((four[3] * base + four[2]) * base + four[1]) * base + four[0];
    }
    return half[0] | uint64_t{half[1]} << 4 * coder.bits;
}

QSDP_INLINE float inverse_of(const Coder& coder) {
    if (coder.levels == nullptr) return inverse_step(coder.working);
    return 1.0f / (coder.working.step * static_cast<float>((1 << coder.bits) - 1));
}

template <class T>
QSDP_INLINE Run decode_run(uint64_t stream, const Coder& coder, uint64_t block, T) {
    const bool has_own = is_one<takes_back_values>(coder.rounding);
    PhiloxBlock own{};
    if (has_own) own = philox(coder.stream, block);
    const uint32_t last = (1u << coder.bits) - 1;
    const uint32_t half[2] = {static_cast<uint32_t>(stream),
                              static_cast<uint32_t>(stream >> 4 * coder.bits)};
    const float width = coder.working.step * static_cast<float>(last);
    const float unscale = 1.0f / coder.working.factor, limit = largest(T{});
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const uint32_t code = half[i / 4] >> i % 4 * coder.bits & last;
        float value;
        if (coder.levels != nullptr) {
            value = coder.grid.low + coder.levels[code] * width;
        } else {
            const float r = has_own ? number_of(coder.rounding, own, i) : coder.r;
            value =
                (coder.working.low + (static_cast<float>(code) + r) * coder.working.step) * unscale;
            if (coder.has_zero && code == last) value = 0.0f;
        }
        value = value > limit ? limit : value;
        value = value < -limit ? -limit : value;
        run.x[i] = canonical(value);  // NaN stays
    }
    return run;
}

}  // namespace qsdp
