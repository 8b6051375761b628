// Changes to a kept row. Any bytes may come: what is wrong is returned, and nothing outside the
// bucket is touched.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "common/changes.h"
#include "common/segment.h"
#include "cpu/difference-inl.h"
#include "cpu/kernels.h"
#include "cpu/pack-inl.h"
#include "cpu/say-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// ``last``: the greatest code.
QSDP_INLINE Fault apply_list(const uint8_t* data, int num_entries, int64_t count, int last,
                             uint8_t* codes) {
    int before = -1, before_down = 0;
    for (int i = 0; i < num_entries; ++i) {
        const int place = data[i] & (kDownBit - 1), down = data[i] & kDownBit;
        if (place < before || place >= count) return Fault::kList;
        if (place == before && down != before_down) return Fault::kList;
        before = place, before_down = down;
        const int now = codes[place] + (down ? -1 : 1);
        if (now < 0 || now > last) return Fault::kCode;
        codes[place] = static_cast<uint8_t>(now);
    }
    return Fault::kNone;
}

// 64 bits from bit ``at`` on, of nine bytes that may be read.
QSDP_INLINE uint64_t bits_from(const uint8_t* stream, int at) {
    uint64_t low;
    memcpy(&low, stream + at / 8, sizeof low);
    const uint64_t high = stream[at / 8 + 8];
    return low >> at % 8 | high << 1 << (63 - at % 8);
}

// What a map says, or what is wrong with it.
QSDP_INLINE Fault read_map(const uint8_t* data, int room, int64_t count, Difference& said) {
    const int64_t mask_bytes = (count + 7) / 8, how_bytes = (room + 3) / 4;
    memcpy(said.changed, data, mask_bytes);
    const int num_changed = count_bits(said.changed);
    if (num_changed > room) return Fault::kMap;
    if (count % 8 != 0 && data[mask_bytes - 1] >> count % 8 != 0) return Fault::kMap;
    // Two bits for each of kMostKept values at most, and what bits_from may read behind them.
    uint8_t how[kMostKept / 4 + 32] = {};
    memcpy(how, data + mask_bytes, how_bytes);
    if (how[num_changed / 4] >> 2 * (num_changed % 4) != 0) return Fault::kMap;
    for (int i = num_changed / 4 + 1; i < how_bytes; ++i) {
        if (how[i] != 0) return Fault::kMap;
    }
    int at = 0;
    for (int word = 0; word < kMaskWords; ++word) {
        const uint64_t changed = said.changed[word];
        const uint64_t low = bits_from(how, at), high = bits_from(how, at + 64);
        const uint64_t down = even_bits(low) | even_bits(high) << 32;
        const uint64_t by_two = even_bits(low >> 1) | even_bits(high >> 1) << 32;
        said.down[word] = scatter_bits(down, changed);
        said.by_two[word] = scatter_bits(by_two, changed);
        at += 2 * std::popcount(changed);
    }
    return Fault::kNone;
}

QSDP_INLINE Fault apply_map(const uint8_t* data, int room, int64_t count, int last,
                            uint8_t* codes) {
    Difference said{};
    const Fault fault = read_map(data, room, count, said);
    if (fault != Fault::kNone) return fault;
    const Codes one = splat_codes(1), most = splat_codes(last);
    uint64_t wrong = 0;
    for (int i = 0; i < kMostKept; i += kBlock) {
        const uint64_t changed = said.changed[i / 64] >> i % 64;
        const uint64_t by_two = said.by_two[i / 64] >> i % 64;
        const uint64_t down = said.down[i / 64] >> i % 64;
        const Codes before = load_codes(codes + i);
        const Codes more = add(where(changed & ~down, one), where(by_two & ~down, one));
        const Codes less = add(where(changed & down, one), where(by_two & down, one));
        const Codes now = sub(add(before, more), less);
        // Sums stop at 0 and at 255.
        wrong |= not_equal(distance(now, before), add(more, less)) | not_equal(min(now, most), now);
        store(codes + i, now);
    }
    return wrong == 0 ? Fault::kNone : Fault::kCode;
}

Fault apply_changes(const ChangedBuckets& changed, int32_t step, uint8_t* kept) {
    const Segment& segment = *changed.segment;
    const int bits = static_cast<int>(segment.bits), last = (1 << bits) - 1;
    const uint8_t* data = changed.data;
    uint8_t codes[kMostKept + 8] = {};
    for (int64_t bucket = changed.first; bucket < changed.last; ++bucket) {
        const int head = count_at(changed.counts, bucket, segment.bits);
        if (head == 0) continue;
        const int64_t count = values_of(segment, bucket);
        uint8_t* row = kept + segment.data_byte + codes_start(segment, bucket);
        const uint8_t* own = data;
        data += bytes_said(head, count, bits);
        if (head >= kWhole) {
            if (head == kDrawn) {
                memcpy(kept + segment.meta_byte + bucket * kMetaBytes, own, kMetaBytes);
                memcpy(kept + segment.epoch_byte + bucket * kEpochBytes, &step, kEpochBytes);
                own += kMetaBytes;
            }
            memcpy(row, own, packed_bytes(count, bits));
            continue;
        }
        unpack_codes(row, count, bits, codes);
        const Fault fault = head <= kMostListed
                                ? apply_list(own, head, count, last, codes)
                                : apply_map(own, head - kMostListed, count, last, codes);
        if (fault != Fault::kNone) return fault;
        say_codes(codes, count, bits, row);
    }
    return Fault::kNone;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
