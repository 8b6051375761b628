// What a rounding does to values, before they become codes and after.
#pragma once

#include "common/rounding.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// The numbers of values, drawn as 128 + k / 2**16: in (-1/2, 1/2) for dither, in (0, 1) for
// stochastic.
template <Noise noise>
QSDP_INLINE F number_of(const F& drawn) {
    return add(sub(drawn, splat(noise == Noise::kDither ? 128.5f : 128.0f)), splat(0x1p-17f));
}

// What is rounded in place of t: down, which is truncation as t >= 0, if stochastic, else to the
// nearest. ``r`` is the bucket's shift.
template <Noise noise>
QSDP_INLINE F before_rounding(const F& t, const F& drawn, const F& r) {
    if constexpr (noise == Noise::kUniform) {
        return sub(t, r);
    } else if constexpr (noise == Noise::kDither) {
        return sub(t, number_of<noise>(drawn));
    } else {
        return add(t, number_of<noise>(drawn));
    }
}

// What a code stands for. A receiver knows the shift and the dither, and takes them back.
template <Noise noise>
QSDP_INLINE F after_rounding(const F& code, const F& drawn, const F& r) {
    if constexpr (noise == Noise::kDither) {
        return add(code, number_of<noise>(drawn));
    } else {
        return add(code, r);
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
