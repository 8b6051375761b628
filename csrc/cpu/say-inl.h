// What a frame says of a bucket whose grid stays: a list of changes, a map of them, or all codes.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/changes.h"
#include "cpu/difference-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// By what a change names its direction, in an entry of a list.
constexpr uint8_t kDownBit = 0x80;

// The codes of a bucket that was kept, one a byte.
QSDP_INLINE void kept_codes(const uint8_t* from, int64_t count, int bits, uint8_t* codes) {
    if (bits == 8) {
        memcpy(codes, from, count);
    } else {
        kUnpack[bits](from, count, codes);
    }
}

// All codes of a bucket, which may be read, and are overwritten, up to a multiple of eight.
QSDP_INLINE uint8_t* say_codes(uint8_t* codes, int64_t count, int bits, uint8_t* to) {
    if (bits == 8) {
        memcpy(to, codes, count);
    } else {
        memset(codes + count, 0, 8);
        kPack[bits](codes, count, to);
    }
    return to + packed_bytes(count, bits);
}

// ``is_by_one``: whether all changes are.
QSDP_INLINE uint8_t* say_list(const Difference& found, const uint8_t* now, const uint8_t* kept,
                              bool is_by_one, uint8_t* to) {
    for (int word = 0; word < kMaskWords; ++word) {
        for (uint64_t left = found.changed[word]; left != 0; left &= left - 1) {
            const int bit = std::countr_zero(left), place = 64 * word + bit;
            const bool down = found.down[word] >> bit & 1;
            const uint8_t entry = static_cast<uint8_t>(place | (down ? kDownBit : 0));
            *to++ = entry;
            if (is_by_one) continue;
            for (int more = std::abs(now[place] - kept[place]) - 1; more > 0; --more) *to++ = entry;
        }
    }
    return to;
}

QSDP_INLINE uint8_t* say_map(const Difference& found, int64_t count, int num_changed, uint8_t* to) {
    constexpr uint64_t kEven = 0x5555555555555555u;
    uint64_t how[2 * kMaskWords + 1] = {};
    int at = 0;
    for (int word = 0; word < kMaskWords; ++word) {
        const uint64_t down = gather_bits(found.down[word], found.changed[word]);
        const uint64_t by_two = gather_bits(found.by_two[word], found.changed[word]);
        const int size = 2 * std::popcount(found.changed[word]);
        for (int half = 0; 64 * half < size; ++half) {
            const uint64_t both = scatter_bits(down >> 32 * half, kEven) |
                                  scatter_bits(by_two >> 32 * half, kEven << 1);
            const int start = at + 64 * half;
            how[start / 64] |= both << start % 64;
            if (start % 64 != 0) how[start / 64 + 1] |= both >> (64 - start % 64);
        }
        at += size;
    }
    const int64_t mask_bytes = (count + 7) / 8, how_bytes = (num_changed + 3) / 4;
    memcpy(to, found.changed, mask_bytes);
    memcpy(to + mask_bytes, how, how_bytes);
    return to + mask_bytes + how_bytes;
}

// Writes the shortest at ``to``, which moves behind it, and returns the bucket's count byte.
QSDP_INLINE int say_changes(const Difference& found, int num_changed, uint8_t* now,
                            const uint8_t* kept, int64_t count, int bits, uint8_t*& to) {
    if (num_changed == 0) return 0;
    int64_t num_entries = num_changed + count_bits(found.by_two);
    if (found.by_more) {
        num_entries = 0;
        for (int64_t i = 0; i < count; ++i) num_entries += std::abs(now[i] - kept[i]);
    }
    const int64_t whole = packed_bytes(count, bits);
    const int64_t map = found.by_more ? whole + 1 : map_bytes(count, num_changed);
    if (num_entries <= kMostListed && num_entries <= map && num_entries <= whole) {
        to = say_list(found, now, kept, num_entries == num_changed, to);
        return static_cast<int>(num_entries);
    }
    if (map <= whole) {
        to = say_map(found, count, num_changed, to);
        return kMostListed + num_changed;
    }
    to = say_codes(now, count, bits, to);
    return kWhole;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
