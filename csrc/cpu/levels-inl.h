// Learned levels: which one a value is rounded to.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/rounding.h"
#include "common/segment.h"
#include "cpu/rounding-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// A segment's levels laid out for look_up, which wants at least sixteen entries.
struct Levels {
    float value[1 << kMostLearnedBits];
    // Row s: the levels that a bisection's step s may compare with, by the steps before it.
    float middle[kMostLearnedBits][1 << (kMostLearnedBits - 1)];
    int bits;

    void fill(const float* from, int num_bits) {
        bits = num_bits;
        const int count = 1 << bits;
        memcpy(value, from, count * sizeof(float));
        for (int i = count; i < 16; ++i) value[i] = value[i - count];
        for (int step = 0; step < bits; ++step) {
            const int stride = count >> step, size = 1 << (step < 4 ? 4 : step);
            for (int i = 0; i < size; ++i) {
                middle[step][i] = value[i % (1 << step) * stride + stride / 2];
            }
        }
    }
};

template <int Step>
QSDP_INLINE void bisect_step(const Levels& levels, const F (&t)[4], F (&below)[4], F (&above)[4],
                             I (&index)[4]) {
    for (int v = 0; v < 4; ++v) {
        const F middle = look_up<Step>(levels.middle[Step], index[v]);
        bisect(middle, t[v], below[v], above[v], index[v]);
    }
}

// The codes of t, given 128 + k / 2**16 for each if one is drawn.
template <Rounding how>
QSDP_INLINE Codes level_codes(const Levels& levels, const F (&t)[4], const F (&own)[4]) {
    const int last = (1 << levels.bits) - 1;
    F below[4], above[4];
    I index[4];
    for (int v = 0; v < 4; ++v) {
        below[v] = splat(levels.value[0]), above[v] = splat(levels.value[last]);
        index[v] = splat_bits(0);
    }
    bisect_step<0>(levels, t, below, above, index);
    bisect_step<1>(levels, t, below, above, index);
    if (levels.bits > 2) bisect_step<2>(levels, t, below, above, index);
    if (levels.bits > 3) bisect_step<3>(levels, t, below, above, index);
    if (levels.bits > 4) bisect_step<4>(levels, t, below, above, index);
    if (levels.bits > 5) bisect_step<5>(levels, t, below, above, index);
    for (int v = 0; v < 4; ++v) {
        F least = sub(above[v], t[v]);
        if (draws_for_levels(how)) {
            const F u = number_from(own[v], 0.0f);
            least = mul(u, sub(above[v], below[v]));
        }
        index[v] = add_where_less(index[v], least, sub(t[v], below[v]));
    }
    return min(to_codes(index), splat_codes(last));
}

// The levels of codes below 2**bits.
QSDP_INLINE F level_values(const Levels& levels, I codes) {
    switch (levels.bits) {
        case 6:
            return look_up<6>(levels.value, codes);
        case 5:
            return look_up<5>(levels.value, codes);
        default:
            return look_up<4>(levels.value, codes);
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
