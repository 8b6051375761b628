// Values to changes of a kept row: measure a bucket, decide on its grid, quantize it, say what
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

// After how many buckets that have not changed it is worth a branch whether the next one has: if
// only some have, it would be foretold wrongly, and cost more than what it saves.
constexpr int64_t kLongStill = 8;

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

// Buckets [first, last) of a coded segment, whose data go to ``to``.
template <class T>
void encode_changed_buckets(const Segment& segment, uint64_t key, const ChangesCall& call,
                            bool is_trained, uint8_t* heads, int64_t first, int64_t last,
                            Gathered& gathered, uint8_t*& to, Changes& changes) {
    const int bits = static_cast<int>(segment.bits);
    const uint32_t every = is_trained ? redraw_steps(call.redraw_every) : 0;
    const Quantize* kernels = quantizers<T>(segment.rounding);
    uint8_t codes[kMostKept + 8] = {}, unpacked[kMostKept + 8] = {};
    bool expect_zeros = false;  // as where buckets are encoded
    int64_t still = 0;          // buckets since one that has changed
    for (int64_t bucket = first; bucket < last; ++bucket) {
        const int64_t count = values_of(segment, bucket);
        const uint8_t* from =
            call.buffer + segment.buffer_byte + bucket * segment.bucket * sizeof(T);
        Extent extent =
            expect_zeros ? measure<T, true>(from, count) : measure<T, false>(from, count);
        if (extent.has_zero && !expect_zeros) extent = measure<T, true>(from, count);
        expect_zeros = extent.has_zero;
        const KeptGrid kept = kept_grid(segment, call.kept, bucket);
        KeptGrid own = kept;
        const bool again = is_drawn_again(extent, kept, segment, bucket, call.step, every);
        if (again) {
            own.grid = make_grid(extent.low, extent.high, extent.has_zero, extent.broken, bits);
            if (!extent.broken) own.grid = with_room(own.grid, call.room, call.twice_room, bits);
            own.epoch = call.step;
        }
        if (extent.broken) {
            memset(codes, 0, count);
        } else {
            const bool has_zero = keeps_zero(own.grid);
            const Work work{.grid = working_grid(own.grid),
                            .r = 0.0f,
                            .stream = stream_of(segment, key),
                            .base = base_of(own.epoch),
                            .num_codes = 1 << bits,
                            .has_zero = has_zero,
                            .ahead_bytes = count * static_cast<int64_t>(sizeof(T)),
                            .levels = nullptr};
            const Quantize run = kernels[static_cast<int>(mode_of(work.grid, has_zero))];
            run(from, count, work, bucket * segment.bucket, codes);
        }
        if (again && memcmp(&own, &kept, sizeof own) != 0) {
            uint8_t* said = gathered.next();
            memcpy(said, &own.grid, sizeof own.grid);
            gathered.add(say_codes(codes, count, bits, said + sizeof own.grid), to);
            heads[bucket] = kDrawn;
            ++changes.num_drawn;
            continue;
        }
        const uint8_t* row = call.kept + segment.data_byte + codes_start(segment, bucket);
        const bool is_unpacked = bits == 8 && count == kMostKept;
        if (!is_unpacked) unpack_codes(row, count, bits, unpacked);
        const uint8_t* before = is_unpacked ? row : unpacked;
        Difference found;
        still = find_changed(codes, before, count, found.changed) ? 0 : still + 1;
        if (still >= kLongStill) {
            heads[bucket] = 0;
            continue;
        }
        find_how(codes, before, found);
        const int num_changed = count_bits(found.changed);
        uint8_t* said = gathered.next();
        heads[bucket] =
            static_cast<uint8_t>(say_changes(found, num_changed, codes, before, count, bits, said));
        gathered.add(said, to);
        changes.num_changed += num_changed;
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
