// Units of values to codes: whole units of plain buckets by a way of their own, all others bucket
// by bucket.
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

// What of a bucket's grid its values are encoded by.
struct Scale {
    float low;
    float inverse;  // of the step; negative, -0 too, where there are zeros
    float r;
};

// The extents of groups of ``Together`` rows.
template <bool SkipZeros, int Together>
QSDP_INLINE void measure_groups(PerLane<Run[kRows]>& held,
                                PerLane<Extent[kRows / Together]>& extents) {
    each_lane([&](int lane) {
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            Extent& extent = extents[lane][row / Together];
            if (row % Together == 0) extent = nothing();
            measure<SkipZeros>(held[lane][row], extent);
        }
    });
}

// A whole unit of buckets of ``Bucket`` values, read once. Of each bucket some lanes, its owners,
// make the grid. Returns false, having done nothing, where a bucket is special.
template <class T, int Bucket, Rounding how>
QSDP_INLINE bool encode_whole_unit(const Work& work, int64_t unit) {
    constexpr int kTogether = Bucket < kRow ? 1 : Bucket / kRow;   // rows of a bucket
    constexpr int kWidth = Bucket < kRow ? Bucket / kRun : kWarp;  // lanes of a bucket
    constexpr int kBuckets = kUnit / Bucket, kGroups = kRows / kTogether;
    using Own = Owners<kWidth, kGroups>;
    const Item& item = *work.item;
    const int bits = item.bits;
    const Stream stream{work.key, item.parameter, item.group};
    const uint8_t* from = work.from + item.buffer_byte + unit * kUnit * sizeof(T);
    uint8_t* data = work.to + item.data_byte + unit * (kUnit / kRun) * bits;
    uint8_t* meta = work.to + item.meta_byte + unit * kBuckets * kMetaBytes;
    PerLane<Run[kRows]> held;
    each_lane([&](int lane) {
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            held[lane][row] = load_run(from + (row * kRow + lane * kRun) * sizeof(T), T{});
        }
    });
    PerLane<Extent[kGroups]> extents;
    PerLane<Extent> extent;
    measure_groups<false, kTogether>(held, extents);
    combine_groups<kWidth, kGroups>(extents, extent);
    const bool has_zeros = any(extent, [](const Extent& own) { return own.has_zero(); });
    if (has_zeros) {
        measure_groups<true, kTogether>(held, extents);
        combine_groups<kWidth, kGroups>(extents, extent);
    }
    PerLane<Grid> grid;
    each_lane([&](int lane) { grid[lane] = grid_of(extent[lane], bits); });
    if (any(grid, [](Grid own) { return !is_plain(own); })) return false;
    PerLane<Scale> scale;
    each_lane([&](int lane) {
        const Grid own = grid[lane];
        const int bucket = (Own::group_of(lane) * kTogether * kRow + lane * kRun) / Bucket;
        if (lane % Own::kLanes == 0) store_grid(meta + bucket * kMetaBytes, own);
        const float inverse = inverse_step({1.0f, own.low, fabsf(own.scale)});
        scale[lane] = {own.low, copysignf(inverse, own.scale), 0.0f};
        if (!draws_for_values(how) && is_one<shifts_buckets>(item.rounding)) {
            // A unit's buckets share a block.
            const uint64_t number = static_cast<uint64_t>(unit * kBuckets);
            const uint32_t index = static_cast<uint32_t>(number) + static_cast<uint32_t>(bucket);
            scale[lane].r = centred(half_of(philox(stream, number / kRun), index));
        }
    });
    QSDP_UNROLL(8)
    for (int group = 0; group < kGroups; ++group) {
        PerLane<Scale> shared;
        from_owners<kWidth, kGroups>(scale, group, shared);
        each_lane([&](int lane) {
            const Scale own = shared[lane];
            const Plain plain = make_plain(own.low, 0.0f, fabsf(own.inverse), own.r,
                                           is_negative(own.inverse), bits);
            QSDP_UNROLL(8)
            for (int i = 0; i < kTogether; ++i) {
                const int row = group * kTogether + i, offset = row * kRow + lane * kRun;
                const Run& run = held[lane][row];
                const uint64_t block = block_of(unit * kUnit + offset);
                store_stream(data + offset / kRun * bits,
                             has_zeros ? encode_plain<how, true>(run, plain, stream, block)
                                       : encode_plain<how, false>(run, plain, stream, block),
                             bits);
            }
        });
    }
    return true;
}

// One bucket of any size, at any address; read twice.
template <class T>
QSDP_INLINE void encode_bucket(const Work& work, int64_t bucket) {
    const Item& item = *work.item;
    const int bits = item.bits;
    const int64_t start = bucket * item.bucket;
    const int64_t left = item.numel - start, count = left < item.bucket ? left : item.bucket;
    const uint8_t* from = work.from + item.buffer_byte + start * sizeof(T);
    const auto load = [&](int64_t i) {
        const int64_t rest = count - i;
        return load_some(from + i * sizeof(T), rest < kRun ? static_cast<int>(rest) : kRun, T{});
    };
    PerLane<Extent> extent;
    each_lane([&](int lane) {
        extent[lane] = nothing();
        for (int64_t i = lane * kRun; i < count; i += kRow) measure<false>(load(i), extent[lane]);
    });
    combine<kWarp>(extent);
    if (any(extent, [](const Extent& e) { return e.has_zero(); })) {
        each_lane([&](int lane) {
            extent[lane] = nothing();
            for (int64_t i = lane * kRun; i < count; i += kRow) {
                measure<true>(load(i), extent[lane]);
            }
        });
        combine<kWarp>(extent);
    }
    each_lane([&](int lane) {
        Shifts shifts{-1, {}};
        const Extent own = extent[lane];
        const Grid grid = grid_of(own, bits);
        if (lane == 0) store_grid(work.to + item.meta_byte + bucket * kMetaBytes, grid);
        const Coder coder =
            make_coder(item, work.key, work.levels, grid, own.has_zero(), own.is_broken(),
                       shifts.at<shifts_buckets>(item, work.key, bucket));
        const float inverse = inverse_of(coder);
        for (int64_t i = lane * kRun; i < count; i += kRow) {
            const int64_t rest = count - i;
            const int valid = rest < kRun ? static_cast<int>(rest) : kRun;
            uint64_t stream = encode_run(load(i), coder, inverse, block_of(start + i));
            if (valid < kRun) stream &= (uint64_t{1} << valid * bits) - 1;
            store_stream(work.to + item.data_byte + (start + i) / kRun * bits, stream,
                         (valid * bits + 7) / 8);
        }
    });
}

template <class T, int Bucket>
QSDP_INLINE bool encode_whole_buckets(const Work& work, int64_t unit) {
    return with_kernel<encoder_of>(work.item->rounding, [&](auto kernel) {
        return encode_whole_unit<T, Bucket, decltype(kernel)::value>(work, unit);
    });
}

// Whether the unit is done: its buckets are of a size that kernels are made for, and plain.
template <class T>
QSDP_INLINE bool encode_whole(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const bool is_whole = (unit + 1) * kUnit <= item.numel && item.levels < 0 &&
                          is_aligned(work.from + item.buffer_byte, sizeof(Words));
    if (!is_whole) return false;
    switch (item.bucket) {
        case 128:
            return encode_whole_buckets<T, 128>(work, unit);
        case 256:
            return encode_whole_buckets<T, 256>(work, unit);
        case 1024:
            return encode_whole_buckets<T, 1024>(work, unit);
        default:
            return false;
    }
}

template <class T>
QSDP_INLINE void encode_coded(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    if (encode_whole<T>(work, unit)) return;
    const int64_t first = unit * item.per_unit, all = (item.numel + item.bucket - 1) / item.bucket;
    for (int64_t bucket = first; bucket < first + item.per_unit && bucket < all; ++bucket) {
        encode_bucket<T>(work, bucket);
    }
}

}  // namespace qsdp
