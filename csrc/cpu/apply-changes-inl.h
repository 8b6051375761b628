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

// A code changed by ``by``; its highest bits say whether it is none of ``last`` + 1.
QSDP_INLINE Fault change_code(uint8_t& code, int by, int last) {
    const int now = code + by;
    if (now < 0 || now > last) return Fault::kCode;
    code = static_cast<uint8_t>(now);
    return Fault::kNone;
}

QSDP_INLINE Fault apply_list(const uint8_t* data, int num_entries, int64_t count, int last,
                             uint8_t* codes) {
    int before = -1, before_down = 0;
    for (int i = 0; i < num_entries; ++i) {
        const int place = data[i] & (kDownBit - 1), down = data[i] & kDownBit;
        if (place < before || place >= count) return Fault::kList;
        if (place == before && down != before_down) return Fault::kList;
        before = place, before_down = down;
        const Fault fault = change_code(codes[place], down ? -1 : 1, last);
        if (fault != Fault::kNone) return fault;
    }
    return Fault::kNone;
}

QSDP_INLINE Fault apply_map(const uint8_t* data, int num_changed, int64_t count, int last,
                            uint8_t* codes) {
    if (num_changed > count) return Fault::kTooMany;
    const int64_t mask_bytes = (count + 7) / 8, how_bytes = (num_changed + 3) / 4;
    Mask changed = {};
    memcpy(changed, data, mask_bytes);
    const uint8_t* how = data + mask_bytes;
    if (count_bits(changed) != num_changed) return Fault::kMap;
    if (count % 8 != 0 && data[mask_bytes - 1] >> count % 8 != 0) return Fault::kMap;
    if (num_changed % 4 != 0 && how[how_bytes - 1] >> 2 * (num_changed % 4) != 0) {
        return Fault::kMap;
    }
    int i = 0;
    for (int word = 0; word < kMaskWords; ++word) {
        for (uint64_t left = changed[word]; left != 0; left &= left - 1, ++i) {
            const int bits = how[i / 4] >> i % 4 * 2, by = bits & 2 ? 2 : 1;
            uint8_t& code = codes[64 * word + std::countr_zero(left)];
            const Fault fault = change_code(code, bits & 1 ? -by : by, last);
            if (fault != Fault::kNone) return fault;
        }
    }
    return Fault::kNone;
}

Fault apply_changes(const ChangedBuckets& changed, int32_t step, uint8_t* kept) {
    const Segment& segment = *changed.segment;
    const int bits = static_cast<int>(segment.bits), last = (1 << bits) - 1;
    const uint8_t* data = changed.data;
    uint8_t codes[kMostKept + 8] = {};
    for (int64_t bucket = changed.first; bucket < changed.last; ++bucket) {
        const int head = changed.heads[bucket];
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
        kept_codes(row, count, bits, codes);
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
