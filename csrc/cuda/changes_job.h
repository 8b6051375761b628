// A table of a kept row as work for warps. A segment is cut into units, of which a warp takes one;
// where the data of a unit's buckets lie is a sum over all units before it, so that several
// launches follow each other, and what they tell each other lies in the GPU's memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/changes.h"
#include "common/frame_fault.h"
#include "common/segment.h"
#include "cuda/find_item.h"
#include "cuda/memory.h"
#include "cuda/raw.h"
#include "cuda/starts.h"
#include "cuda/warp.h"

namespace qsdp {

constexpr int64_t kUnitBuckets = 32, kUnitRaw = 4 * kUnit;  // buckets or raw values of a unit
static_assert(kUnitBuckets % 2 == 0, "a byte of two counts is of one unit");

struct ChangesItem {
    Segment segment;
    PlaceInFrame place;  // where there is room for all that may be said of it
    int64_t first_unit;  // units of the items before it
    Look look;           // encode_changes
};

QSDP_INLINE int64_t num_units(const Segment& segment) {
    const int64_t parts = segment.bits == 0 ? segment.numel : num_buckets(segment);
    const int64_t size = segment.bits == 0 ? kUnitRaw : kUnitBuckets;
    return parts / size + (parts % size != 0);
}

// What the launches of a call come to.
struct ChangesReport {
    int64_t body_bytes;
    int64_t num_changed, num_drawn;  // encode_changes
    int64_t fault, fault_number;     // apply_changes: a Fault of the frame, and its number
    int64_t bucket_fault;            // and one of a bucket's data
};

// Where all that lies which the launches share.
struct ChangesBoard {
    ChangesReport* report;
    ChangesItem* items;
    int64_t* starts;       // by item that has changed: of its raw values or counts in the body
    int64_t* data;         // by unit: bytes of its buckets' data, then their start; last: their end
    uint8_t* has_changed;  // by item
    int64_t num_items, num_units;
};

// The items of a table, and the memory that a board of them takes.
struct ChangesPlan {
    std::vector<ChangesItem> items;
    int64_t num_units = 0;
    int64_t room_bytes = 0;  // for all that may be said

    // ``looks``: a Look a segment, or null.
    ChangesPlan(const std::vector<Segment>& segments, const int64_t* looks) {
        std::vector<PlaceInFrame> places;
        room_bytes = set_places(segments, places);
        for (size_t s = 0; s < segments.size(); ++s) {
            const Look look = looks == nullptr ? Look::kStill : static_cast<Look>(looks[s]);
            items.push_back({segments[s], places[s], num_units, look});
            num_units += qsdp::num_units(segments[s]);
        }
    }

    int64_t board_bytes() const {
        const int64_t num = static_cast<int64_t>(items.size());
        const int64_t words = (num_units + 1 + num) * int64_t{sizeof(int64_t)};
        return int64_t{sizeof(ChangesReport)} + num * (int64_t{sizeof(ChangesItem)} + 1) + words;
    }

    // ``memory`` has board_bytes, and its address is a multiple of 8.
    ChangesBoard board(uint8_t* memory) const {
        const int64_t num = static_cast<int64_t>(items.size());
        ChangesBoard board{};
        board.num_items = num, board.num_units = num_units;
        board.report = reinterpret_cast<ChangesReport*>(memory);
        board.items = reinterpret_cast<ChangesItem*>(board.report + 1);
        board.starts = reinterpret_cast<int64_t*>(board.items + num);
        board.data = board.starts + num;
        board.has_changed = reinterpret_cast<uint8_t*>(board.data + num_units + 1);
        return board;
    }
};

// Items on their way to the GPU, as a launch's argument.
struct ChangesDelivery {
    static constexpr int kMaxItems = 27;
    ChangesBoard board;
    int64_t first;
    int32_t num_items;
    ChangesItem items[kMaxItems];
};
static_assert(sizeof(ChangesDelivery) <= 4096, "more makes every launch slower");

// Calls ``launch(delivery)`` with all items, at least once.
template <class Launch>
void deliver(const std::vector<ChangesItem>& items, const ChangesBoard& board,
             const Launch& launch) {
    ChangesDelivery delivery;
    delivery.board = board;
    size_t i = 0;
    do {
        delivery.first = static_cast<int64_t>(i), delivery.num_items = 0;
        for (; i < items.size() && delivery.num_items < ChangesDelivery::kMaxItems; ++i) {
            delivery.items[delivery.num_items++] = items[i];
        }
        launch(delivery);
    } while (i < items.size());
}

// By one warp: the board as it is at the beginning.
QSDP_INLINE void take_delivery(const ChangesDelivery& delivery) {
    const ChangesBoard& board = delivery.board;
    each_lane([&](int lane) {
        if (lane == 0 && delivery.first == 0) *board.report = {};
        for (int i = lane; i < delivery.num_items; i += kWarp) {
            board.items[delivery.first + i] = delivery.items[i];
            board.has_changed[delivery.first + i] = 0;
        }
    });
}

QSDP_INLINE int64_t item_of(const ChangesBoard& board, int64_t unit) {
    return find_item(board.items, board.num_items, unit);
}

// The part of an item that a unit has: buckets, or raw values.
struct Stretch {
    int64_t first, last;
};

QSDP_INLINE Stretch stretch_of(const ChangesItem& item, int64_t unit) {
    const Segment& segment = item.segment;
    const int64_t size = segment.bits == 0 ? kUnitRaw : kUnitBuckets;
    const int64_t first = (unit - item.first_unit) * size, end = first + size;
    const int64_t parts = segment.bits == 0 ? segment.numel : num_buckets(segment);
    return {first, end < parts ? end : parts};
}

// By one warp: where what has changed of the raw segments, or of the others, starts in the body,
// from byte ``end`` on. Returns their end.
QSDP_INLINE int64_t place_items(const ChangesBoard& board, bool are_raw, int64_t end) {
    for (int64_t first = 0; first < board.num_items; first += kWarp) {
        PerLane<int64_t> before;
        const auto is_one = [&](int64_t i) {
            return i < board.num_items && board.has_changed[i] != 0 &&
                   (board.items[i].segment.bits == 0) == are_raw;
        };
        each_lane([&](int lane) {
            before[lane] = 0;
            if (!is_one(first + lane)) return;
            const Segment& segment = board.items[first + lane].segment;
            before[lane] =
                are_raw ? data_bytes(segment) : counts_bytes(num_buckets(segment), segment.bits);
        });
        const int64_t all = sum_before(before);
        each_lane([&](int lane) {
            if (is_one(first + lane)) board.starts[first + lane] = end + before[lane];
        });
        end += all;
    }
    return end;
}

// By one lane.
QSDP_INLINE void add_up(int64_t* sum, int64_t more) {
#if defined(__CUDA_ARCH__)
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(more));
#else
    *sum += more;
#endif
}

QSDP_INLINE void keep_greatest(int64_t* greatest, int64_t other) {
#if defined(__CUDA_ARCH__)
    atomicMax(reinterpret_cast<long long*>(greatest), static_cast<long long>(other));
#else
    *greatest = *greatest < other ? other : *greatest;
#endif
}

// How many of a run's values a lane has in a bucket of ``count``, a run a lane.
QSDP_INLINE int valid_of(int lane, int count) {
    const int left = count - lane * kRun;
    return left < 0 ? 0 : left < kRun ? left : kRun;
}

QSDP_INLINE uint64_t low_bits(uint64_t stream, int count) {
    return count < 64 ? stream & ((uint64_t{1} << count) - 1) : stream;
}

// A run's codes in a kept row, from the first byte of the bucket's on.
QSDP_INLINE uint64_t load_codes(const uint8_t* row, int lane, int valid, int bits) {
    const uint64_t stream = load_stream(row + lane * bits, (valid * bits + 7) / 8);
    return low_bits(stream, valid * bits);
}

QSDP_INLINE void store_codes(uint8_t* row, uint64_t codes, int lane, int valid, int bits) {
    store_stream(row + lane * bits, codes, (valid * bits + 7) / 8);
}

}  // namespace qsdp
