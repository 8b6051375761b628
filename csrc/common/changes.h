// Changes to a kept row: when a grid is drawn again, and what a count byte says of a bucket's data;
// see [Note: Changes] in qsdp/ops/reference/changes.py, which this follows operation by operation.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/grid.h"
#include "common/half.h"
#include "common/portable.h"
#include "common/segment.h"

namespace qsdp {

// How a segment is looked at: not at all; without a schedule; with one.
enum class Look : int64_t { kStill = 0, kFrozen = 1, kTrained = 2 };

// Count bytes: 0 is unchanged, then come a list's entries, kMostListed and the room of a map. At
// kNibbleBits and fewer nibbles stand for some of them: 0 to kMostInNibble for themselves, the next
// two for maps, the last two for the last two.
constexpr int kMostListed = 125, kWhole = 254, kDrawn = 255;
constexpr int kNibbleBits = 5, kMostInNibble = 11, kSmallMap = 24, kLargeMap = 64;

// Values of bucket ``bucket``.
QSDP_INLINE int64_t values_of(const Segment& segment, int64_t bucket) {
    const int64_t left = segment.numel - bucket * segment.bucket;
    return left < segment.bucket ? left : segment.bucket;
}

QSDP_INLINE int64_t packed_bytes(int64_t num_values, int64_t bits) {
    return (num_values * bits + 7) / 8;
}

// Where bucket ``bucket``'s codes start among those of its segment.
QSDP_INLINE int64_t codes_start(const Segment& segment, int64_t bucket) {
    return bucket * segment.bucket / 8 * segment.bits;
}

// The count byte that a nibble stands for, and the other way.
QSDP_INLINE int count_of(int nibble) {
    if (nibble <= kMostInNibble) return nibble;
    if (nibble > kMostInNibble + 2) return nibble | 0xF0;
    return kMostListed + (nibble == kMostInNibble + 1 ? kSmallMap : kLargeMap);
}

QSDP_INLINE int nibble_of(int count) {
    if (count <= kMostInNibble) return count;
    if (count >= kWhole) return count & 0x0F;
    return kMostInNibble + (count == kMostListed + kSmallMap ? 1 : 2);
}

// Bytes of ``num_buckets`` counts.
QSDP_INLINE int64_t counts_bytes(int64_t num_buckets, int64_t bits) {
    return bits <= kNibbleBits ? (num_buckets + 1) / 2 : num_buckets;
}

// The count byte of a bucket, whose segment's counts are in a frame.
QSDP_INLINE int count_at(const uint8_t* counts, int64_t bucket, int64_t bits) {
    if (bits > kNibbleBits) return counts[bucket];
    return count_of(counts[bucket / 2] >> bucket % 2 * 4 & 15);
}

// Byte ``number`` of the counts in a frame, of the count bytes of ``num`` buckets.
QSDP_INLINE uint8_t counts_byte(const uint8_t* heads, int64_t number, int64_t num) {
    const int64_t first = 2 * number;
    const int high = first + 1 < num ? nibble_of(heads[first + 1]) : 0;
    return static_cast<uint8_t>(nibble_of(heads[first]) | high << 4);
}

// Whether the counts have one more than the segment has buckets.
QSDP_INLINE bool counts_too_many(const uint8_t* counts, const Segment& segment) {
    const int64_t num = num_buckets(segment);
    return segment.bits <= kNibbleBits && num % 2 != 0 && counts[num / 2] >> 4 != 0;
}

// Bytes of a map with room for ``room`` changes among ``num_values``.
QSDP_INLINE int64_t map_bytes(int64_t num_values, int64_t room) {
    return (num_values + 7) / 8 + (room + 3) / 4;
}

// Bytes of the data of a bucket of ``num_values``.
QSDP_INLINE int64_t bytes_said(int count, int64_t num_values, int64_t bits) {
    if (count <= kMostListed) return count;
    if (count < kWhole) return map_bytes(num_values, count - kMostListed);
    return packed_bytes(num_values, bits) + (count == kDrawn ? kMetaBytes : 0);
}

// The count byte of the shortest data that say how ``num_changed`` codes of a bucket have changed.
QSDP_INLINE int shortest(int64_t num_entries, int num_changed, bool by_more, int64_t num_values,
                         int bits) {
    const bool in_nibbles = bits <= kNibbleBits;
    const int64_t whole = packed_bytes(num_values, bits);
    const int room = !in_nibbles ? num_changed : num_changed <= kSmallMap ? kSmallMap : kLargeMap;
    const bool can_map = num_changed <= room && !by_more;
    const int64_t map = can_map ? map_bytes(num_values, room) : whole + 1;
    if (num_entries <= (in_nibbles ? kMostInNibble : kMostListed) && num_entries <= map &&
        num_entries <= whole) {
        return static_cast<int>(num_entries);
    }
    return map <= whole ? kMostListed + room : kWhole;
}

inline int64_t bitmap_bytes(const std::vector<Segment>& segments) {
    return (static_cast<int64_t>(segments.size()) + 7) / 8;
}

// Where a segment's bytes start in a frame that says all that it can, its counts in bytes: raw
// values or count bytes, and the data of its buckets.
struct PlaceInFrame {
    int64_t start, data;
};

// Of all segments; returns the bytes of such a frame.
inline int64_t set_places(const std::vector<Segment>& segments, std::vector<PlaceInFrame>& places) {
    places.assign(segments.size(), {});
    int64_t end = bitmap_bytes(segments);
    for (size_t s = 0; s < segments.size(); ++s) {
        if (segments[s].bits != 0) continue;
        places[s].start = end;
        end += data_bytes(segments[s]);
    }
    for (size_t s = 0; s < segments.size(); ++s) {
        if (segments[s].bits == 0) continue;
        places[s].start = end;
        end += num_buckets(segments[s]);
    }
    for (size_t s = 0; s < segments.size(); ++s) {
        if (segments[s].bits == 0) continue;
        places[s].data = end;
        end += num_buckets(segments[s]) * kMetaBytes + data_bytes(segments[s]);
    }
    return end;
}

// Bytes of such a frame: no body has more.
inline int64_t most_body_bytes(const std::vector<Segment>& segments) {
    int64_t sum = bitmap_bytes(segments);
    for (const Segment& segment : segments) {
        sum += data_bytes(segment);
        if (segment.bits != 0) sum += num_buckets(segment) * (1 + kMetaBytes);
    }
    return sum;
}

// At which steps a bucket is due, besides how often: 31 bits that look random.
QSDP_INLINE uint32_t due_offset(const Segment& segment, int64_t bucket) {
    uint64_t x = (static_cast<uint64_t>(segment.parameter) << 32) + static_cast<uint64_t>(bucket) +
                 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((x ^ x >> 31) >> 33);
}

// Whether the steps since a grid's epoch, shifted by the offset, reach a multiple of ``every``. The
// sum of two numbers of 31 bits has 32.
QSDP_INLINE bool is_due(uint32_t offset, int32_t epoch, int32_t step, uint32_t every) {
    const int64_t elapsed = int64_t{step} - epoch;
    return elapsed >= every || (static_cast<uint32_t>(step) + offset) % every < elapsed;
}

// Steps as is_due takes them: more than it can count are never over.
QSDP_INLINE uint32_t redraw_steps(int64_t every) {
    return every < UINT32_MAX ? static_cast<uint32_t>(every) : UINT32_MAX;
}

QSDP_INLINE bool keeps_zero(Grid grid) {
    return float_bits(grid.scale) >> 31;
}

QSDP_INLINE float steps_of(bool has_zero, int bits) {
    return static_cast<float>((1 << bits) - (has_zero ? 2 : 1));
}

// Which part of a kept grid its values reach over at least.
constexpr float kLeastReach = 0.25f;

// Whether values from ``low`` to ``high`` have left the grid, or reach over too little of it.
QSDP_INLINE bool has_outlived(Grid grid, float low, float high, int bits) {
    if (grid.scale == 0.0f) return low != grid.low || high != grid.low;
    const WorkingGrid working = working_grid(grid);
    const float inverse = 1.0f / working.step;
    const float least = (low * working.factor - working.low) * inverse;
    const float most = (high * working.factor - working.low) * inverse;
    const float steps = steps_of(keeps_zero(grid), bits);
    return !(least >= 0.0f && most <= steps && most - least >= kLeastReach * steps);
}

struct KeptGrid {
    Grid grid;
    int32_t epoch;
};

// Whether a bucket's grid is drawn again. ``extent`` has ``low`` and ``high``, of the values that
// are not zero (low > high: there are none), ``has_zero`` and ``broken``. ``every``: 0 for weights
// that are never due.
template <class Extent>
QSDP_INLINE bool is_drawn_again(const Extent& extent, const KeptGrid& kept, const Segment& segment,
                                int64_t bucket, int32_t step, uint32_t every) {
    const bool was_broken = kept.grid.low != kept.grid.low;
    if (extent.broken || was_broken) return extent.broken != was_broken;
    if (extent.has_zero && !keeps_zero(kept.grid)) return true;
    if (every != 0 && is_due(due_offset(segment, bucket), kept.epoch, step, every)) return true;
    const bool has_live = extent.low <= extent.high;
    return has_live &&
           has_outlived(kept.grid, extent.low, extent.high, static_cast<int>(segment.bits));
}

// The grid with a part of its range left free on both sides, if that is finite.
QSDP_INLINE Grid with_room(Grid grid, float room, float twice_room, int bits) {
    const float step = fabsf(grid.scale);
    const float wider = step + twice_room * step;
    const float lower = grid.low - room * (steps_of(keeps_zero(grid), bits) * step);
    if (!(wider <= FLT_MAX && fabsf(lower) <= FLT_MAX)) return grid;
    return {lower, copysignf(wider, grid.scale)};
}

}  // namespace qsdp
