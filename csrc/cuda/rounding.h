// What a rounding does to a value, before it becomes a code and after.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/half.h"
#include "common/philox.h"
#include "common/portable.h"
#include "common/rounding.h"

namespace qsdp {

// The number of value i of a block: in (-1/2, 1/2) for dither, in (0, 1) for stochastic.
template <Noise noise>
QSDP_INLINE float number_of(const PhiloxBlock& block, int i) {
    const float drawn = bits_float(0x43000000u | half_word(block, static_cast<uint64_t>(i)));
    return (drawn - (noise == Noise::kDither ? 128.5f : 128.0f)) + 0x1p-17f;
}

// What is rounded in place of t: down if stochastic, else to the nearest. ``r`` is the bucket's
// shift.
template <Noise noise>
QSDP_INLINE float before_rounding(float t, const PhiloxBlock& block, int i, float r) {
    if (noise == Noise::kUniform) return t - r;
    if (noise == Noise::kDither) return t - number_of<noise>(block, i);
    return t + number_of<noise>(block, i);
}

constexpr float kWhole = 0x1.8p23f;  // added, leaves a whole number in the low bits
constexpr uint32_t kWholeBits = 0x4B400000u;

QSDP_INLINE float add_down(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rd(a, b);
#else
    return floorf(a) + b;  // b is a multiple of the sum's ulp, 1
#endif
}

// t rounded, plus kWholeBits.
template <Noise noise>
QSDP_INLINE uint32_t round_to_bits(float t) {
    return float_bits(noise == Noise::kStochastic ? add_down(t, kWhole) : t + kWhole);
}

// What a code stands for. A receiver knows the shift and the dither, and takes them back.
template <Noise noise>
QSDP_INLINE float after_rounding(float code, const PhiloxBlock& block, int i, float r) {
    return code + (noise == Noise::kDither ? number_of<noise>(block, i) : r);
}

// The same where the rounding is known at run time alone. ``r``: the shift of the value or the
// bucket, in (-1/2, 1/2).
QSDP_INLINE float before_rounding(Rounding rounding, float t, float r) {
    return rounding == kStochastic ? t + (r + 0.5f) : t - r;
}

// Of 0 <= t <= 255.
QSDP_INLINE uint32_t round_to_code(Rounding rounding, float t) {
    return rounding == kStochastic ? static_cast<uint32_t>(t) : float_bits(t + kWhole) & 0xFFu;
}

}  // namespace qsdp
