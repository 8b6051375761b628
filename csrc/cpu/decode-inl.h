// Codes to values, stored or added to what is there.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/grid.h"
#include "common/rounding.h"
#include "common/segment.h"
#include "cpu/bucket-inl.h"
#include "cpu/levels-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/random-inl.h"
#include "cpu/rounding-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// Values of ``count`` codes, stored as T, or with ``Add`` added to what is there.
template <class T, bool Add, Rounding how, Mode mode>
void dequantize(const uint8_t* codes, int64_t count, const Work& work, int64_t first_value,
                uint8_t* to) {
    constexpr bool kHasOwn = draws_for_values(how);
    constexpr int kAtOnce = kHasOwn ? 2 : 1;
    const Draws draws(work.stream, work.base);
    const F low = splat(work.grid.low), step = splat(work.grid.step), r = splat(work.r);
    const F unscale = splat(1.0f / work.grid.factor);
    const F zero_code = splat(work.has_zero ? static_cast<float>(work.num_codes - 1) : 256.0f);
    constexpr float kLargest = largest(T{});
    const F limit = splat(kLargest), minus_limit = splat(-kLargest);
    const F width = splat(width_of(work));
    const auto block_values = [&](const uint8_t* block, const F(&own)[4], uint8_t* out) {
        for (int v = 0; v < 4; ++v) {
            F value;
            if constexpr (mode == Mode::kLevels) {
                const F level = level_values(*work.levels, widen_indices(block + v * kLanes));
                value = add(low, mul(level, width));
            } else {
                const F code = widen_codes(block + v * kLanes);
                value = after_rounding<how>(code, own[v], r);
                value = add(low, mul(value, step));
                if (mode == Mode::kFull) value = mul(value, unscale);
                if (mode != Mode::kPlain) value = zero_where_equal(value, code, zero_code);
            }
            // |value| <= 2**121 or NaN of plain buckets: only fp16 is narrower than that. Levels
            // may be anything.
            if (mode == Mode::kFull || mode == Mode::kLevels || kLargest < 0x1p121f) {
                value = max(minus_limit, min(limit, value));
            }
            uint8_t* item = out + v * kLanes * sizeof(T);
            store(item, Add ? add(load(item, T{}), value) : value, T{});
        }
    };
    int64_t i = 0;
    for (; i + kAtOnce * kBlock <= count; i += kAtOnce * kBlock) {
        F own[kAtOnce][4];
        if (kHasOwn) draws.draw(first_value + i, own);
        for (int b = 0; b < kAtOnce; ++b) {
            const int64_t start = i + b * kBlock;
            block_values(codes + start, own[b], to + start * sizeof(T));
        }
    }
    for (; i < count; i += kBlock) {
        F own[1][4];
        if (kHasOwn) draws.draw(first_value + i, own);
        const int64_t left = count - i < kBlock ? count - i : kBlock;
        uint8_t tail_codes[kBlock] = {}, tail[kBlock * sizeof(T)] = {};
        memcpy(tail_codes, codes + i, left);
        if (Add) memcpy(tail, to + i * sizeof(T), left * sizeof(T));
        block_values(tail_codes, own[0], tail);
        memcpy(to + i * sizeof(T), tail, left * sizeof(T));
    }
}

// By Mode.
template <class T, bool Add, Rounding how>
constexpr Quantize kDequantize[] = {
    dequantize<T, Add, how, Mode::kPlain>, dequantize<T, Add, how, Mode::kZeros>,
    dequantize<T, Add, how, Mode::kFull>, dequantize<T, Add, kOfBuckets, Mode::kLevels>};

template <class T, bool Add>
const Quantize* dequantizers(int64_t rounding) {
    return with_kernel<decoder_of>(rounding, [](auto kernel) -> const Quantize* {
        return kDequantize<T, Add, decltype(kernel)::value>;
    });
}

template <class T, bool Add>
void decode_buckets(const Segment& segment, uint64_t key, const float* own_levels,
                    const uint8_t* payload, uint8_t* buffer, int64_t first, int64_t last) {
    const int bits = static_cast<int>(segment.bits);
    const Quantize* kernels = dequantizers<T, Add>(segment.rounding);
    Shifts shifts(stream_of(segment, key));
    Levels levels;
    if (own_levels != nullptr) levels.fill(own_levels, bits);
    uint8_t codes[kChunk];
    for (int64_t bucket = first; bucket < last; ++bucket) {
        const int64_t start = bucket * segment.bucket;
        const int64_t left = segment.numel - start;
        const int64_t count = left < segment.bucket ? left : segment.bucket;
        const uint8_t* from = payload + segment.data_byte + start / 8 * bits;
        uint8_t* to = buffer + segment.buffer_byte + start * sizeof(T);

        Grid grid;
        memcpy(&grid, payload + segment.meta_byte + bucket * kMetaBytes, sizeof grid);
        const bool has_zero = float_bits(grid.scale) >> 31;
        Work work{.grid = working_grid(grid),
                  .r = 0.0f,
                  .stream = stream_of(segment, key),
                  .base = 0,
                  .num_codes = 1 << bits,
                  .has_zero = has_zero,
                  .ahead_bytes = 0,
                  .levels = &levels};
        if (segment.epoch_byte >= 0) {
            int32_t epoch;
            memcpy(&epoch, payload + segment.epoch_byte + bucket * kEpochBytes, sizeof epoch);
            work.base = base_of(epoch);
        }
        if (is_one<shifts_buckets_back>(segment.rounding)) work.r = shifts.at(bucket);
        const bool by_levels = own_levels != nullptr && has_learned_levels(grid);
        const Mode mode = by_levels ? Mode::kLevels : mode_of(work.grid, has_zero);
        const Quantize run = kernels[static_cast<int>(mode)];
        if (bits == 8) {
            run(from, count, work, start, to);
            continue;
        }
        for (int64_t i = 0; i < count; i += kChunk) {
            const int64_t chunk = count - i < kChunk ? count - i : kChunk;
            kUnpack[bits](from + i / 8 * bits, chunk, codes);
            run(codes, chunk, work, start + i, to + i * sizeof(T));
        }
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
