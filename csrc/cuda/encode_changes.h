// Values to changes of a kept row, by warps. All that is said has its place in a room first, from
// which the body is joined.
#pragma once

#include <cstdint>

#include "common/changes.h"
#include "common/dtype.h"
#include "common/grid.h"
#include "common/segment.h"
#include "cuda/any_bucket.h"
#include "cuda/bucket.h"
#include "cuda/changes_job.h"
#include "cuda/memory.h"
#include "cuda/raw.h"
#include "cuda/run.h"
#include "cuda/say_changes.h"
#include "cuda/warp.h"

namespace qsdp {

struct EncodeChanges {
    ChangesBoard board;
    const uint8_t *buffer, *kept;
    uint8_t *room, *frame;
    uint64_t key;
    int32_t step;
    uint32_t every;  // steps between two draws
    float grid_room, twice_grid_room;
};

// Launches of a call, in this order: take_delivery, say_unit (a warp a unit), place_said (one
// warp), join_unit (a warp a unit).

QSDP_INLINE KeptGrid kept_grid(const Segment& segment, const uint8_t* row, int64_t bucket) {
    const uint8_t* meta = row + segment.meta_byte + bucket * kMetaBytes;
    return {{load_item<float>(meta), load_item<float>(meta + 4)},
            load_item<int32_t>(row + segment.epoch_byte + bucket * kEpochBytes)};
}

QSDP_INLINE bool is_same(const KeptGrid& a, const KeptGrid& b) {
    return float_bits(a.grid.low) == float_bits(b.grid.low) &&
           float_bits(a.grid.scale) == float_bits(b.grid.scale) && a.epoch == b.epoch;
}

// What is_drawn_again looks at.
struct Measured {
    float low, high;
    bool has_zero, broken;
};

// The grid that a measured bucket has now.
QSDP_INLINE KeptGrid grid_now(const EncodeChanges& job, const ChangesItem& item, int64_t bucket,
                              const Extent& extent, const KeptGrid& kept) {
    const Measured measured{extent.low, extent.high, extent.has_zero(), extent.is_broken()};
    const uint32_t every = item.look == Look::kTrained ? job.every : 0;
    if (!is_drawn_again(measured, kept, item.segment, bucket, job.step, every)) return kept;
    const int bits = static_cast<int>(item.segment.bits);
    return {with_room(grid_of(extent, bits), job.grid_room, job.twice_grid_room, bits), job.step};
}

template <class T>
QSDP_INLINE Said say_bucket(const EncodeChanges& job, const ChangesItem& item, int64_t bucket,
                            uint8_t* to) {
    const Segment& segment = item.segment;
    const int bits = static_cast<int>(segment.bits);
    const int count = static_cast<int>(values_of(segment, bucket));
    const int64_t start = bucket * segment.bucket;
    const uint8_t* from = job.buffer + segment.buffer_byte + start * int64_t{sizeof(T)};
    PerLane<Run> runs;
    PerLane<Extent> extents;
    each_lane([&](int lane) {
        extents[lane] = nothing();
        const int valid = valid_of(lane, count);
        if (valid == 0) return;
        const uint8_t* own = from + lane * kRun * int64_t{sizeof(T)};
        const bool is_whole = valid == kRun && is_aligned(own, sizeof(Words));
        runs[lane] = is_whole ? load_run(own, T{}) : load_some(own, valid, T{});
        measure<true>(runs[lane], extents[lane]);
    });
    combine<kWarp>(extents);
    const Extent& extent = extents[0];  // all lanes have it
    const KeptGrid kept = kept_grid(segment, job.kept, bucket);
    const KeptGrid now = grid_now(job, item, bucket, extent, kept);
    Coder coder{};
    coder.grid = now.grid;
    coder.working = working_grid(now.grid);
    coder.has_zero = keeps_zero(now.grid);
    coder.is_broken = extent.is_broken();
    coder.stream = {job.key, static_cast<uint32_t>(segment.parameter),
                    static_cast<uint32_t>(segment.group)};
    coder.bits = bits;
    coder.rounding = static_cast<int16_t>(segment.rounding);
    const float inverse = inverse_of(coder);
    PerLane<uint64_t> codes;
    each_lane([&](int lane) {
        codes[lane] = 0;
        const int valid = valid_of(lane, count);
        if (valid == 0) return;
        const uint64_t block = block_of(start + lane * kRun, static_cast<uint32_t>(now.epoch));
        codes[lane] = low_bits(encode_run(runs[lane], coder, inverse, block), valid * bits);
    });
    if (is_same(now, kept)) {
        const uint8_t* row = job.kept + segment.data_byte + codes_start(segment, bucket);
        return say_changes(codes, row, count, bits, to);
    }
    each_lane([&](int lane) {
        if (lane == 0) store_grid(to, now.grid);
    });
    say_codes(codes, count, bits, to + kMetaBytes);
    return {kDrawn, 0};
}

// Where the data of a unit's buckets, the first of them ``first``, lie in the room.
QSDP_INLINE uint8_t* data_in_room(const EncodeChanges& job, const ChangesItem& item,
                                  int64_t first) {
    return job.room + item.place.data + first * kMetaBytes + codes_start(item.segment, first);
}

// What is said of a unit's buckets, one behind the other. Returns its bytes.
template <class T>
QSDP_INLINE int64_t say_buckets(const EncodeChanges& job, int64_t number, Stretch own) {
    const ChangesItem& item = job.board.items[number];
    uint8_t* const data = data_in_room(job, item, own.first);
    uint8_t* heads = job.room + item.place.start;
    int64_t bytes = 0, num_changed = 0, num_drawn = 0;
    bool has_changed = false;
    for (int64_t bucket = own.first; bucket < own.last; ++bucket) {
        const Said said = say_bucket<T>(job, item, bucket, data + bytes);
        each_lane([&](int lane) {
            if (lane == 0) heads[bucket] = static_cast<uint8_t>(said.head);
        });
        bytes += bytes_said(said.head, values_of(item.segment, bucket), item.segment.bits);
        num_changed += said.num_changed;
        num_drawn += said.head == kDrawn;
        has_changed |= said.head != 0;
    }
    each_lane([&](int lane) {
        if (lane != 0 || !has_changed) return;
        job.board.has_changed[number] = 1;
        add_up(&job.board.report->num_changed, num_changed);
        add_up(&job.board.report->num_drawn, num_drawn);
    });
    return bytes;
}

// Raw values as they travel.
QSDP_INLINE void say_raw(const EncodeChanges& job, int64_t number, Stretch own) {
    const ChangesItem& item = job.board.items[number];
    const Segment& segment = item.segment;
    uint8_t* to = job.room + item.place.start;
    copy_raw(static_cast<int>(segment.dtype), static_cast<int>(segment.wire),
             job.buffer + segment.buffer_byte, to, own.first, own.last, false);
    settle();
    const uint8_t* kept = job.kept + segment.data_byte;
    const int64_t size = item_bytes(segment.wire);
    each_lane([&](int lane) {
        bool differs = false;
        for (int64_t i = own.first * size + lane; i < own.last * size; i += kWarp) {
            differs |= to[i] != kept[i];
        }
        if (differs) job.board.has_changed[number] = 1;
    });
}

QSDP_INLINE void say_unit(const EncodeChanges& job, int64_t unit) {
    const ChangesBoard& board = job.board;
    if (unit >= board.num_units) return;
    const int64_t number = item_of(board, unit);
    const ChangesItem& item = board.items[number];
    const Segment& segment = item.segment;
    const Stretch own = stretch_of(item, unit);
    int64_t bytes = 0;
    if (item.look != Look::kStill) {
        if (segment.bits == 0) {
            say_raw(job, number, own);
        } else if (segment.dtype == kFp32) {
            bytes = say_buckets<float>(job, number, own);
        } else if (segment.dtype == kBf16) {
            bytes = say_buckets<Bf16>(job, number, own);
        } else {
            bytes = say_buckets<Fp16>(job, number, own);
        }
    }
    each_lane([&](int lane) {
        if (lane == 0) board.data[unit] = bytes;
    });
}

// Where in the body everything comes, and which segments there are.
QSDP_INLINE void place_said(const EncodeChanges& job) {
    const ChangesBoard& board = job.board;
    const int64_t num = board.num_items, bitmap = (num + 7) / 8;
    each_lane([&](int lane) {
        for (int64_t byte = lane; byte < bitmap; byte += kWarp) {
            uint32_t bits = 0;
            for (int i = 0; i < 8 && 8 * byte + i < num; ++i) {
                bits |= uint32_t{board.has_changed[8 * byte + i]} << i;
            }
            job.frame[byte] = static_cast<uint8_t>(bits);
        }
    });
    const int64_t start = place_items(board, false, place_items(board, true, bitmap));
    const int64_t end = start_from(board.data, board.num_units, start);
    each_lane([&](int lane) {
        if (lane != 0) return;
        board.data[board.num_units] = end;
        board.report->body_bytes = end;
    });
}

// A unit's part of the body.
QSDP_INLINE void join_unit(const EncodeChanges& job, int64_t unit) {
    const ChangesBoard& board = job.board;
    if (unit >= board.num_units) return;
    const int64_t number = item_of(board, unit);
    if (board.has_changed[number] == 0) return;
    const ChangesItem& item = board.items[number];
    const Stretch own = stretch_of(item, unit);
    const Segment& segment = item.segment;
    const uint8_t* from = job.room + item.place.start;
    uint8_t* to = job.frame + board.starts[number];
    if (segment.bits == 0) {
        const int64_t size = item_bytes(segment.wire);
        return copy_bytes(from, to, own.first * size, own.last * size);
    }
    if (segment.bits > kNibbleBits) {
        copy_bytes(from, to, own.first, own.last);
    } else {
        each_lane([&](int lane) {  // an even number of buckets, but for the last unit
            const int64_t i = own.first / 2 + lane;
            if (2 * i < own.last) to[i] = counts_byte(from, i, own.last);
        });
    }
    const int64_t start = board.data[unit];
    copy_bytes(data_in_room(job, item, own.first), job.frame + start, 0,
               board.data[unit + 1] - start);
}

}  // namespace qsdp
