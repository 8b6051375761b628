// What a rounding does to a value, before it becomes a code and after.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/half.h"
#include "common/philox.h"
#include "common/portable.h"
#include "common/rounding.h"

namespace qsdp {

// The number of value i of a block: r of [Note: Grid], or r + 1/2 for what rounds down.
template <Rounding how>
QSDP_INLINE float number_of(const PhiloxBlock& block, int i) {
    const float drawn = bits_float(0x43000000u | half_word(block, static_cast<uint64_t>(i)));
    return (drawn - (rounds_down(how) ? 128.0f : 128.5f)) + 0x1p-17f;
}

// What is rounded in place of t, down or to the nearest. ``r`` is the bucket's shift.
template <Rounding how>
QSDP_INLINE float before_rounding(float t, const PhiloxBlock& block, int i, float r) {
    constexpr bool kDown = rounds_down(how);
    if constexpr (draws_for_values(how)) {
        return kDown ? t + number_of<how>(block, i) : t - number_of<how>(block, i);
    } else {
        return kDown ? t + (r + 0.5f) : t - r;
    }
}

constexpr float kWholeNumber = 0x1.8p23f;  // added, leaves a whole number in the low bits
constexpr uint32_t kWholeNumberBits = 0x4B400000u;

QSDP_INLINE float add_down(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rd(a, b);
#else
    return floorf(a) + b;  // b is a multiple of the sum's ulp, 1
#endif
}

// t rounded, plus kWholeNumberBits.
template <Rounding how>
QSDP_INLINE uint32_t round_to_bits(float t) {
    return float_bits(rounds_down(how) ? add_down(t, kWholeNumber) : t + kWholeNumber);
}

// What a code stands for. ``r`` is the bucket's shift, or 0 where that is not taken back.
template <Rounding how>
QSDP_INLINE float after_rounding(float code, const PhiloxBlock& block, int i, float r) {
    if constexpr (draws_for_values(how)) {
        static_assert(!rounds_down(how), "number_of is not what a receiver takes back");
        return code + number_of<how>(block, i);
    } else {
        return code + r;
    }
}

// The same where the rounding is known at run time alone. ``r``: of the value or the bucket, in
// (-1/2, 1/2).
QSDP_INLINE float number_of(int16_t /* all draw alike */, const PhiloxBlock& block, int i) {
    return centred(half_word(block, static_cast<uint64_t>(i)));
}

QSDP_INLINE float before_rounding(int16_t rounding, float t, float r) {
    return is_one<rounds_down>(rounding) ? t + (r + 0.5f) : t - r;
}

// Of 0 <= t <= 255.
QSDP_INLINE uint32_t round_to_code(int16_t rounding, float t) {
    return is_one<rounds_down>(rounding) ? static_cast<uint32_t>(t)
                                         : float_bits(t + kWholeNumber) & 0xFFu;
}

}  // namespace qsdp
