// bf16 and fp16 as bits, with round-half-even conversions. A NaN becomes the positive quiet NaN,
// but bf16 in fp32 keeps its bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/portable.h"

namespace qsdp {

struct Bf16 {
    uint16_t bits;
};

struct Fp16 {
    uint16_t bits;
};

QSDP_INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

QSDP_INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The value, where a NaN becomes the one that all kernels give.
QSDP_INLINE float canonical(float value) {
    return value == value ? value : bits_float(0x7FC00000u);
}

QSDP_INLINE float widen(float value) {
    return value;
}

QSDP_INLINE float widen(Bf16 value) {
    return bits_float(uint32_t{value.bits} << 16);
}

QSDP_INLINE float widen(Fp16 value) {
    const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
    const uint32_t magnitude = value.bits & 0x7FFFu;
    // Subnormals and normals alike are the magnitude as a float, times 2**112.
    float wide = bits_float(magnitude << 13) * 0x1p112f;
    if (magnitude > 0x7C00u) return bits_float(0x7FC00000u);
    if (magnitude == 0x7C00u) wide = bits_float(0x7F800000u);
    return bits_float(float_bits(wide) | sign);
}

QSDP_INLINE void narrow(float value, float& out) {
    out = value;
}

QSDP_INLINE void narrow(float value, Bf16& out) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    out.bits = static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

QSDP_INLINE void narrow(float value, Fp16& out) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        out.bits = 0x7E00u;
        return;
    }
    if (magnitude < 0x38800000u) {
        // A subnormal half is a multiple of 2**-24, the ulp of 1/2: adding 1/2 rounds to it.
        half = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
        if (half > 0x7C00u) half = 0x7C00u;
    }
    out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace qsdp
