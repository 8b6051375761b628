// Codes of a plain bucket, neither huge, nor broken, nor served by learned levels: the same codes
// and values as in any_bucket.h, by fewer instructions.
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

struct Plain {
    float low, step, inverse, r;
    float steps;      // codes but those of zero, less one
    float zero_code;  // what no code is where there are no zeros
    uint32_t last;
    int bits;
};

QSDP_INLINE bool is_negative(float x) {
    return float_bits(x) >> 31 != 0;
}

// ``step`` is needed to decode, ``inverse`` to encode.
QSDP_INLINE Plain make_plain(float low, float step, float inverse, float r, bool has_zero,
                             int bits) {
    Plain plain;
    plain.low = low;
    plain.step = step;
    plain.inverse = inverse;
    plain.r = r;
    plain.last = (1u << bits) - 1;
    plain.steps = static_cast<float>(plain.last - has_zero);
    plain.zero_code = has_zero ? static_cast<float>(plain.last) : -1.0f;
    plain.bits = bits;
    return plain;
}

// Not so for NaN either.
QSDP_INLINE bool is_plain(Grid grid) {
    return fabsf(grid.low) <= 0x1p120f && fabsf(grid.scale) <= 0x1p112f;
}

// As encode_run. Values but zeros are at least the low, so nothing is below code 0.
template <Rounding how, bool Zeros>
QSDP_INLINE uint64_t encode_plain(const Run& run, const Plain& plain, Stream stream,
                                  uint64_t block) {
    PhiloxBlock own{};
    if (draws_for_values(how)) own = philox(stream, block);
    uint32_t raw[kRun];
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        float t = (run.x[i] - plain.low) * plain.inverse;
        t = fminf(before_rounding<how>(t, own, i, plain.r), plain.steps);
        raw[i] = round_to_bits<how>(t);
        if (Zeros && run.x[i] == 0.0f) raw[i] = kWholeNumberBits + plain.last;
    }
    const uint32_t base = plain.last + 1;
    const uint32_t excess = kWholeNumberBits * (((base + 1) * base + 1) * base + 1);
    uint32_t half[2];
    QSDP_UNROLL(8)
    for (int h = 0; h < 2; ++h) {
        const uint32_t* four = raw + 4 * h;
        half[h] = ((four[3] * base + four[2]) * base + four[1]) * base + four[0] - excess;
    }
    return half[0] | uint64_t{half[1]} << 4 * plain.bits;
}

// As decode_run.
template <Rounding how, bool Zeros, class T>
QSDP_INLINE Run decode_plain(uint64_t codes, const Plain& plain, Stream stream, uint64_t block, T) {
    PhiloxBlock own{};
    if (draws_for_values(how)) own = philox(stream, block);
    const uint32_t half[2] = {static_cast<uint32_t>(codes),
                              static_cast<uint32_t>(codes >> 4 * plain.bits)};
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const uint32_t bits = (half[i / 4] >> i % 4 * plain.bits & plain.last) | 0x4B000000u;
        const float code = bits_float(bits) - 0x1p23f;
        float value = plain.low + after_rounding<how>(code, own, i, plain.r) * plain.step;
        if (Zeros && code == plain.zero_code) value = 0.0f;
        if (sizeof(T) == 2) value = fmaxf(fminf(value, largest(T{})), -largest(T{}));
        run.x[i] = value;
    }
    return run;
}

}  // namespace qsdp
