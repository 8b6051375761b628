// Units of codes to values, stored or added to what is there: whole units of plain buckets by a way
// of their own.
#pragma once

#include "common/grid.h"
#include "common/rounding.h"
#include "cuda/any_bucket.h"
#include "cuda/bucket.h"
#include "cuda/jobs.h"
#include "cuda/memory.h"
#include "cuda/plain_bucket.h"
#include "cuda/run.h"
#include "cuda/warp.h"

namespace qsdp {

// ``Kept``: whether buckets have epochs. 0 where they have none.
template <bool Kept>
QSDP_INLINE uint32_t epoch_of(const Work& work, int64_t bucket) {
    if constexpr (!Kept) return 0;
    return load_item<uint32_t>(work.from + work.epoch_byte + bucket * kEpochBytes);
}

// A whole unit of buckets of 2**item.bucket_log2 <= 1024 values, none of them special.
template <class T, bool Add, bool Kept, Rounding how, bool Zeros>
QSDP_INLINE void decode_whole_rows(const Work& work, int64_t unit, int bucket_log2,
                                   PerLane<uint64_t[kRows]>& codes, PerLane<Grid[kRows]>& grid) {
    const Item& item = *work.item;
    const Stream stream{work.key, item.parameter, item.group};
    uint8_t* to = work.to + item.buffer_byte + unit * kUnit * sizeof(T);
    each_lane([&](int lane) {
        Shifts shifts{-1, {}};  // a unit's buckets share a block, or two
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            const int offset = row * kRow + lane * kRun;
            const int64_t index = unit * kUnit + offset;
            const float shift =
                shifts.at<shifts_buckets_back>(item, work.key, index >> bucket_log2);
            const Grid own = grid[lane][row];
            const Plain plain = make_plain(own.low, fabsf(own.scale), 0.0f, shift,
                                           is_negative(own.scale), item.bits);
            const uint64_t block = block_of(index, epoch_of<Kept>(work, index >> bucket_log2));
            Run run = decode_plain<how, Zeros>(codes[lane][row], plain, stream, block, T{});
            uint8_t* out = to + offset * sizeof(T);
            if (Add) {
                const Run there = load_run(out, T{});
                QSDP_UNROLL(8)
                for (int i = 0; i < kRun; ++i) run.x[i] = add_exactly(there.x[i], run.x[i]);
            }
            store_run(out, run, lane, T{});
        }
    });
}

// Returns false, having done nothing, where a bucket is special.
template <class T, bool Add, bool Kept>
QSDP_INLINE bool decode_whole(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const int bits = item.bits, bucket_log2 = item.bucket_log2;
    const uint8_t* from = work.from + item.data_byte + unit * (kUnit / kRun) * bits;
    PerLane<uint64_t[kRows]> codes;
    PerLane<Grid[kRows]> grid;
    each_lane([&](int lane) {  // many loads on their way at once
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            const int offset = row * kRow + lane * kRun;
            const int64_t bucket = (unit * kUnit + offset) >> bucket_log2;
            const uint8_t* meta = work.from + item.meta_byte + bucket * kMetaBytes;
            codes[lane][row] = load_stream(from + offset / kRun * bits, bits);
            grid[lane][row] = {load_item<float>(meta), load_item<float>(meta + 4)};
        }
    });
    const auto any_row = [&](const auto& test) {
        return any(grid, [&](const Grid(&rows)[kRows]) {
            bool found = false;
            QSDP_UNROLL(8)
            for (int row = 0; row < kRows; ++row) found |= test(rows[row]);
            return found;
        });
    };
    if (any_row([](Grid own) { return !is_plain(own); })) return false;
    const bool has_zeros = any_row([](Grid own) { return is_negative(own.scale); });
    with_kernel<decoder_of>(item.rounding, [&](auto kernel) {
        constexpr Rounding kHow = decltype(kernel)::value;
        has_zeros
            ? decode_whole_rows<T, Add, Kept, kHow, true>(work, unit, bucket_log2, codes, grid)
            : decode_whole_rows<T, Add, Kept, kHow, false>(work, unit, bucket_log2, codes, grid);
    });
    return true;
}

// A unit of buckets of any size and kind, at any address.
template <class T, bool Add, bool Kept>
QSDP_INLINE void decode_any(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const int bits = item.bits;
    const int64_t start = unit * item.unit_values, left = item.numel - start;
    const int64_t count = left < item.unit_values ? left : item.unit_values;
    each_lane([&](int lane) {
        Shifts shifts{-1, {}};
        QSDP_UNROLL(1)
        for (int64_t offset = lane * kRun; offset < count; offset += kRow) {
            const int64_t index = start + offset, rest = count - offset;
            const int64_t bucket = index / item.bucket;
            const int valid = rest < kRun ? static_cast<int>(rest) : kRun;
            const uint8_t* meta = work.from + item.meta_byte + bucket * kMetaBytes;
            const Grid grid{load_item<float>(meta), load_item<float>(meta + 4)};
            const float shift = shifts.at<shifts_buckets_back>(item, work.key, bucket);
            const Coder coder = make_coder(item, work.key, work.levels, grid,
                                           float_bits(grid.scale) >> 31, false, shift);
            const uint64_t codes = load_stream(work.from + item.data_byte + index / kRun * bits,
                                               (valid * bits + 7) / 8);
            const uint64_t block = block_of(index, epoch_of<Kept>(work, bucket));
            Run run = decode_run(codes, coder, block, T{});
            uint8_t* out = work.to + item.buffer_byte + index * sizeof(T);
            if (Add) {
                const Run there = load_some(out, valid, T{});
                QSDP_UNROLL(8)
                for (int i = 0; i < kRun; ++i) run.x[i] = add_exactly(there.x[i], run.x[i]);
            }
            store_some(out, run, valid, T{});
        }
    });
}

template <class T, bool Add, bool Kept>
QSDP_INLINE void decode_coded(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const bool is_whole = (unit + 1) * kUnit <= item.numel && item.unit_values == kUnit &&
                          item.bucket_log2 >= 0 && item.levels < 0 &&
                          is_aligned(work.to + item.buffer_byte, sizeof(Words));
    if (is_whole && decode_whole<T, Add, Kept>(work, unit)) return;
    decode_any<T, Add, Kept>(work, unit);
}

}  // namespace qsdp
