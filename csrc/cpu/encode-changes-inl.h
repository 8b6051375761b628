// Values to changes of a kept row: measure buckets, decide on their grids, quantize them, say what
// differs from the kept codes.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "common/changes.h"
#include "common/dtype.h"
#include "common/grid.h"
#include "common/segment.h"
#include "cpu/bucket-inl.h"
#include "cpu/difference-inl.h"
#include "cpu/encode-inl.h"
#include "cpu/kernels.h"
#include "cpu/pack-inl.h"
#include "cpu/raw-inl.h"
#include "cpu/say-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

QSDP_INLINE KeptGrid kept_grid(const Segment& segment, const uint8_t* row, int64_t bucket) {
    KeptGrid kept;
    memcpy(&kept.grid, row + segment.meta_byte + bucket * kMetaBytes, sizeof kept.grid);
    memcpy(&kept.epoch, row + segment.epoch_byte + bucket * kEpochBytes, sizeof kept.epoch);
    return kept;
}

// The data of a range of buckets, gathered in cache: what a bucket says may be written in a few
// long strokes that end behind it.
class Gathered {
  public:
    // Where the next bucket's data go, up to kMostSaid bytes of them.
    uint8_t* next() { return bytes_ + size_; }

    // The next bucket's end at ``end``, and ``to`` is where all data are kept.
    void add(const uint8_t* end, uint8_t*& to) {
        size_ = end - bytes_;
        if (size_ >= kSize) flush(to);
    }

    void flush(uint8_t*& to) {
        memcpy(to, bytes_, size_);
        to += size_, size_ = 0;
    }

  private:
    static constexpr int64_t kSize = 1 << 12;
    uint8_t bytes_[kSize + kMostSaid];
    int64_t size_ = 0;
};

// How many buckets take each step together. A bucket's steps wait for each other, and other
// buckets' can be worked on meanwhile if they are few instructions away.
constexpr int64_t kGroup = 16;

// A bucket as it is now, beside what is kept of it.
struct Current {
    // A byte a code, 0 behind the last.
    alignas(64) uint8_t codes[kMostKept + 64] = {}, unpacked[kMostKept + 64] = {};
    const uint8_t* before;  // the kept codes
    int64_t count;
    KeptGrid own;
    bool is_drawn;
    Quantize run;  // null if the bucket is broken
    Work work;
    Difference found;
};

// Decides on a bucket's grid.
template <class Extent>
QSDP_INLINE void decide(const Extent& extent, const Segment& segment, uint64_t key,
                        const ChangesCall& call, int64_t bucket, uint32_t every,
                        const Quantize* kernels, Current& now) {
    const int bits = static_cast<int>(segment.bits);
    const KeptGrid kept = kept_grid(segment, call.kept, bucket);
    KeptGrid own = kept;
    const bool again = is_drawn_again(extent, kept, segment, bucket, call.step, every);
    if (again) {
        own.grid = make_grid(extent.low, extent.high, extent.has_zero, extent.broken, bits);
        if (!extent.broken) own.grid = with_room(own.grid, call.room, call.twice_room, bits);
        own.epoch = call.step;
    }
    now.own = own;
    now.is_drawn = again && memcmp(&own, &kept, sizeof own) != 0;
    now.run = nullptr;
    if (extent.broken) return;
    const bool has_zero = keeps_zero(own.grid);
    now.work = {.grid = working_grid(own.grid),
                .r = 0.0f,
                .stream = stream_of(segment, key),
                .base = base_of(own.epoch),
                .num_codes = 1 << bits,
                .has_zero = has_zero,
                .ahead_bytes = kGroup * segment.bucket * item_bytes(segment.dtype),
                .levels = nullptr};
    now.run = kernels[static_cast<int>(mode_of(now.work.grid, has_zero))];
}

// Writes the data of a bucket, and returns its count byte.
QSDP_INLINE int say_bucket(Current& now, int bits, Gathered& gathered, uint8_t*& to,
                           Changes& changes) {
    uint8_t* said = gathered.next();
    if (now.is_drawn) {
        memcpy(said, &now.own.grid, sizeof now.own.grid);
        said = say_codes(now.codes, now.count, bits, said + sizeof now.own.grid);
        gathered.add(said, to);
        ++changes.num_drawn;
        return kDrawn;
    }
    find_how(now.codes, now.before, now.found);
    const int num_changed = count_bits(now.found.changed);
    const int head =
        say_changes(now.found, num_changed, now.codes, now.before, now.count, bits, said);
    gathered.add(said, to);
    changes.num_changed += num_changed;
    return head;
}

// Buckets [first, last) of a coded segment, whose data go to ``to``.
template <class T>
void encode_changed_buckets(const Segment& segment, uint64_t key, const ChangesCall& call,
                            bool is_trained, uint8_t* heads, int64_t first, int64_t last,
                            Gathered& gathered, uint8_t*& to, Changes& changes) {
    const int bits = static_cast<int>(segment.bits);
    const uint32_t every = is_trained ? redraw_steps(call.redraw_every) : 0;
    const Quantize* kernels = quantizers<T>(segment.rounding);
    const auto values_at = [&](int64_t bucket) {
        return call.buffer + segment.buffer_byte + bucket * segment.bucket * sizeof(T);
    };
    const auto row_at = [&](int64_t bucket) {
        return call.kept + segment.data_byte + codes_start(segment, bucket);
    };
    Current group[kGroup];
    bool expect_zeros = false;  // as where buckets are encoded
    for (int64_t start = first; start < last; start += kGroup) {
        const int64_t num = last - start < kGroup ? last - start : kGroup;
        for (int64_t i = 0; i < num; ++i) {
            const int64_t bucket = start + i, count = values_of(segment, bucket);
            const uint8_t* from = values_at(bucket);
            Extent extent =
                expect_zeros ? measure<T, true>(from, count) : measure<T, false>(from, count);
            if (extent.has_zero && !expect_zeros) extent = measure<T, true>(from, count);
            expect_zeros = extent.has_zero;
            group[i].count = count;
            decide(extent, segment, key, call, bucket, every, kernels, group[i]);
            for (int64_t line = 0; line < packed_bytes(count, bits); line += 64) {
                __builtin_prefetch(row_at(bucket) + line);
            }
        }
        for (int64_t i = 0; i < num; ++i) {
            Current& now = group[i];
            const int64_t bucket = start + i;
            if (now.run == nullptr) {
                memset(now.codes, 0, now.count);
            } else {
                now.run(values_at(bucket), now.count, now.work, bucket * segment.bucket, now.codes);
            }
        }
        bool any = false;
        for (int64_t i = 0; i < num; ++i) {
            Current& now = group[i];
            now.before = kept_codes(row_at(start + i), now.count, bits, now.unpacked);
            if (now.count < segment.bucket) {
                memset(now.codes + now.count, 0, kMostKept - now.count);
                memset(now.unpacked + now.count, 0, kMostKept - now.count);
            }
            any |= find_changed(now.codes, now.before, now.found.changed) | now.is_drawn;
        }
        if (!any) {
            memset(heads + start, 0, num);
            continue;
        }
        for (int64_t i = 0; i < num; ++i) {
            const int head = say_bucket(group[i], bits, gathered, to, changes);
            heads[start + i] = static_cast<uint8_t>(head);
        }
    }
}

// Raw values [begin, end) as they travel, at their place in ``to``; whether they differ from the
// kept ones.
inline bool encode_changed_values(const Segment& segment, const ChangesCall& call, int64_t begin,
                                  int64_t end, uint8_t* to) {
    const int64_t start = begin * item_bytes(segment.wire);
    copy_raw(segment.dtype, segment.wire,
             call.buffer + segment.buffer_byte + begin * item_bytes(segment.dtype), to + start,
             end - begin, false);
    return memcmp(to + start, call.kept + segment.data_byte + start,
                  (end - begin) * item_bytes(segment.wire)) != 0;
}

Changes encode_changes(const Table& table, const ChangesCall& call, int64_t begin, int64_t end) {
    Changes changes{};
    Gathered gathered;
    uint8_t* to = nullptr;
    int64_t start = 0;
    for (int64_t s = 0; s < table.num_segments && start < end; start += table.segments[s++].numel) {
        const Segment& segment = table.segments[s];
        const int64_t from = begin > start ? begin - start : 0;
        const int64_t stop = end - start < segment.numel ? end - start : segment.numel;
        const Look look = static_cast<Look>(call.looks[s]);
        if (from >= stop || look == Look::kStill) continue;
        const PlaceInFrame& place = call.places[s];
        bool is_changed;
        if (segment.bits == 0) {
            is_changed = encode_changed_values(segment, call, from, stop, call.frame + place.start);
        } else {
            const int64_t first = buckets_before(segment, from),
                          last = buckets_before(segment, stop);
            if (first == last) continue;
            uint8_t* data =
                call.frame + place.data + first * kMetaBytes + codes_start(segment, first);
            if (to == nullptr) changes.data = to = data;
            uint8_t* heads = call.frame + place.start;
            with_dtype(segment.dtype, [&](auto type) {
                encode_changed_buckets<decltype(type)>(segment, table.key, call,
                                                       look == Look::kTrained, heads, first, last,
                                                       gathered, to, changes);
            });
            is_changed = false;
            for (int64_t bucket = first; bucket < last; ++bucket) is_changed |= heads[bucket] != 0;
        }
        if (is_changed) std::atomic_ref(call.is_changed[s]).store(1, std::memory_order_relaxed);
    }
    if (to != nullptr) gathered.flush(to);
    changes.data_bytes = to - changes.data;
    return changes;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
