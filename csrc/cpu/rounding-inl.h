// What a rounding does to values, before they become codes and after.
#pragma once

#include "common/rounding.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// A number that was drawn as 128 + k / 2**16, in (0, 1) less ``below``.
QSDP_INLINE F number_from(const F& drawn, float below) {
    return add(sub(drawn, splat(128.0f + below)), splat(0x1p-17f));
}

// The numbers of values: r of [Note: Grid], or r + 1/2 for what rounds down.
template <Rounding how>
QSDP_INLINE F number_of(const F& drawn) {
    return number_from(drawn, rounds_down(how) ? 0.0f : 0.5f);
}

// What is rounded in place of t, down or to the nearest; down is truncation, as t >= 0. ``r`` is
// the bucket's shift.
template <Rounding how>
QSDP_INLINE F before_rounding(const F& t, const F& drawn, const F& r) {
    constexpr bool kDown = rounds_down(how);
    if constexpr (draws_for_values(how)) {
        return kDown ? add(t, number_of<how>(drawn)) : sub(t, number_of<how>(drawn));
    } else {
        return kDown ? add(t, add(r, splat(0.5f))) : sub(t, r);
    }
}

// What a code stands for. ``r`` is the bucket's shift, or 0 where that is not taken back.
template <Rounding how>
QSDP_INLINE F after_rounding(const F& code, const F& drawn, const F& r) {
    if constexpr (draws_for_values(how)) {
        static_assert(!rounds_down(how), "number_of is not what a receiver takes back");
        return add(code, number_of<how>(drawn));
    } else {
        return add(code, r);
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
