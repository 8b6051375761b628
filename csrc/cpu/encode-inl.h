// Values to codes: measure a bucket, quantize it while it is in cache, pack the codes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/grid.h"
#include "common/rounding.h"
#include "common/segment.h"
#include "cpu/block-inl.h"
#include "cpu/bucket-inl.h"
#include "cpu/levels-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/random-inl.h"
#include "cpu/rounding-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

struct Extent {
    float low, high;
    bool has_zero, broken;
};

// ``SkipZeros`` leaves zeros out of low and high; without it they are wrong if has_zero comes back.
// Inline, as a call would keep buckets from overlapping.
template <class T, bool SkipZeros>
QSDP_INLINE Extent measure(const uint8_t* from, int64_t count) {
    const F infinity = splat(INFINITY), minus_infinity = splat(-INFINITY);
    F low[2] = {infinity, infinity}, high[2] = {minus_infinity, minus_infinity};
    I least_bits[2] = {splat_bits(~0u), splat_bits(~0u)};
    I most_bits[2] = {splat_bits(0), splat_bits(0)};
    const auto take = [&](const uint8_t* block) {
        F x[4];
        load_block<T>(block, x);
        for (int v = 0; v < 4; ++v) {
            const I bits = magnitude_bits(x[v]);
            least_bits[v % 2] = min(bits, least_bits[v % 2]);
            most_bits[v % 2] = max(bits, most_bits[v % 2]);
            low[v % 2] = min(SkipZeros ? replace_zeros(x[v], infinity) : x[v], low[v % 2]);
            high[v % 2] = max(SkipZeros ? replace_zeros(x[v], minus_infinity) : x[v], high[v % 2]);
        }
    };
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) take(from + i * sizeof(T));
    if (i < count) take(Tail<T>(from + i * sizeof(T), count - i).bytes);
    return {least(min(low[0], low[1])), greatest(max(high[0], high[1])),
            least(min(least_bits[0], least_bits[1])) == 0,
            greatest(max(most_bits[0], most_bits[1])) >= 0x7F800000u};
}

// Codes, one a byte, of ``count`` values; ``first_value`` numbers the first in its segment.
template <class T, Rounding how, Mode mode>
void quantize(const uint8_t* from, int64_t count, const Work& work, int64_t first_value,
              uint8_t* codes) {
    constexpr bool kHasOwn = draws_for_values(how);
    constexpr int kAtOnce = kHasOwn ? 2 : 1;
    const Draws draws(work.stream, work.base);
    const F factor = splat(work.grid.factor), low = splat(work.grid.low);
    const F inverse =
        splat(mode == Mode::kLevels ? 1.0f / width_of(work) : inverse_step(work.grid));
    const F r = splat(work.r);
    const Codes steps = splat_codes(work.num_codes - (work.has_zero ? 2 : 1));
    const Codes last = splat_codes(work.num_codes - 1);
    const auto block_codes = [&](const uint8_t* block, const F(&own)[4]) {
        F x[4], t[4];
        load_block<T>(block, x);
        for (int v = 0; v < 4; ++v) {
            t[v] = mode == Mode::kFull ? mul(x[v], factor) : x[v];
            t[v] = mul(sub(t[v], low), inverse);
            if (mode == Mode::kLevels) continue;
            t[v] = before_rounding<how>(t[v], own[v], r);
        }
        if constexpr (mode == Mode::kLevels) {
            return level_codes<how>(*work.levels, t, own);
        }
        // Live values have t >= 0, where truncation is floor; zeros are marked whatever t is.
        Codes out = min(to_codes<rounds_down(how)>(t), steps);
        if (mode != Mode::kPlain) out = mark_zeros(out, x, last);
        return out;
    };
    const int64_t ahead_bytes = work.ahead_bytes;
    int64_t i = 0;
    for (; i + kAtOnce * kBlock <= count; i += kAtOnce * kBlock) {
        F own[kAtOnce][4];
        if (kHasOwn) draws.draw(first_value + i, own);
        for (int b = 0; b < kAtOnce; ++b) {
            const uint8_t* block = from + (i + b * kBlock) * sizeof(T);
            for (int64_t line = 0; line < kBlock * static_cast<int64_t>(sizeof(T)); line += 64) {
                __builtin_prefetch(block + line + ahead_bytes);
            }
            store(codes + i + b * kBlock, block_codes(block, own[b]));
        }
    }
    for (; i < count; i += kBlock) {
        F own[1][4];
        if (kHasOwn) draws.draw(first_value + i, own);
        const int64_t left = count - i < kBlock ? count - i : kBlock;
        uint8_t tail[kBlock];
        store(tail, block_codes(Tail<T>(from + i * sizeof(T), left).bytes, own[0]));
        memcpy(codes + i, tail, left);
    }
}

// By Mode.
template <class T, Rounding how>
constexpr Quantize kQuantize[] = {quantize<T, how, Mode::kPlain>, quantize<T, how, Mode::kZeros>,
                                  quantize<T, how, Mode::kFull>,
                                  quantize<T, level_encoder_of(how), Mode::kLevels>};

template <class T>
const Quantize* quantizers(int64_t rounding) {
    return with_kernel<encoder_of>(rounding, [](auto kernel) -> const Quantize* {
        return kQuantize<T, decltype(kernel)::value>;
    });
}

// Buckets [first, last) of a coded segment.
template <class T>
void encode_buckets(const Segment& segment, uint64_t key, const float* own_levels,
                    const uint8_t* buffer, uint8_t* payload, int64_t first, int64_t last) {
    const int bits = static_cast<int>(segment.bits);
    const Quantize* kernels = quantizers<T>(segment.rounding);
    Shifts shifts(stream_of(segment, key));
    Levels levels;
    if (own_levels != nullptr) levels.fill(own_levels, bits);
    uint8_t codes[kChunk + 8];
    bool expect_zeros = false;  // sparse buckets come in runs: measure those once
    for (int64_t bucket = first; bucket < last; ++bucket) {
        const int64_t start = bucket * segment.bucket;
        const int64_t left = segment.numel - start;
        const int64_t count = left < segment.bucket ? left : segment.bucket;
        const uint8_t* from = buffer + segment.buffer_byte + start * sizeof(T);
        uint8_t* to = payload + segment.data_byte + start / 8 * bits;

        Extent extent =
            expect_zeros ? measure<T, true>(from, count) : measure<T, false>(from, count);
        if (extent.has_zero && !expect_zeros) extent = measure<T, true>(from, count);
        expect_zeros = extent.has_zero;
        const Grid grid = make_grid(extent.low, extent.high, extent.has_zero, extent.broken, bits);
        memcpy(payload + segment.meta_byte + bucket * kMetaBytes, &grid, sizeof grid);
        if (extent.broken) {
            memset(to, 0, (count * bits + 7) / 8);
            continue;
        }
        Work work{.grid = working_grid(grid),
                  .r = 0.0f,
                  .stream = stream_of(segment, key),
                  .base = 0,
                  .num_codes = 1 << bits,
                  .has_zero = extent.has_zero,
                  .ahead_bytes = count * static_cast<int64_t>(sizeof(T)),
                  .levels = &levels};
        if (is_one<shifts_buckets>(segment.rounding)) work.r = shifts.at(bucket);
        const bool by_levels = own_levels != nullptr && has_learned_levels(grid);
        const Mode mode = by_levels ? Mode::kLevels : mode_of(work.grid, extent.has_zero);
        const Quantize run = kernels[static_cast<int>(mode)];
        if (bits == 8) {
            run(from, count, work, start, to);
            continue;
        }
        for (int64_t i = 0; i < count; i += kChunk) {
            const int64_t chunk = count - i < kChunk ? count - i : kChunk;
            run(from + i * sizeof(T), chunk, work, start + i, codes);
            memset(codes + chunk, 0, 8);
            kPack[bits](codes, chunk, to + i / 8 * bits);
        }
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
