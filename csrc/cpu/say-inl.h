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

// The most bytes that are written of a bucket, which are more than it says.
constexpr int64_t kMostSaid = kMostKept + 64;

// The codes of a bucket, one a byte.
QSDP_INLINE void unpack_codes(const uint8_t* from, int64_t count, int bits, uint8_t* codes) {
    if (bits == 8) {
        memcpy(codes, from, count);
    } else {
        kUnpack[bits](from, count, codes);
    }
}

// The kept codes of a bucket, one a byte: in place, or in ``codes``.
QSDP_INLINE const uint8_t* kept_codes(const uint8_t* row, int64_t count, int bits, uint8_t* codes) {
    if (count == kMostKept && bits == 8) return row;
    if (count == kMostKept && bits == 4) {
        for (int i = 0; i < kMostKept; i += kBlock) unpack_nibbles(row + i / 2, codes + i);
    } else {
        unpack_codes(row, count, bits, codes);
    }
    return codes;
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

// The changes of a bucket that are all by one. Four entries of a word at a time, as most buckets
// have few: a branch for each would be foretold wrongly.
QSDP_INLINE uint8_t* say_ones(const Difference& found, uint8_t* to) {
    for (int word = 0; word < kMaskWords; ++word) {
        uint64_t left = found.changed[word], down = gather_bits(found.down[word], left);
        uint8_t* entry = to;
        to += std::popcount(left);
        do {
            uint32_t four = 0x01010101u * (64 * word) | to_highest_bits(down);
            for (int i = 0; i < 4; ++i) {
                const int bit = std::countr_zero(left | uint64_t{1} << 63);
                four |= static_cast<uint32_t>(bit) << 8 * i;
                left &= left - 1;
            }
            memcpy(entry, &four, sizeof four);
            entry += sizeof four, down >>= 4;
        } while (left != 0);
    }
    return to;
}

QSDP_INLINE uint8_t* say_list(const Difference& found, const uint8_t* now, const uint8_t* kept,
                              uint8_t* to) {
    for (int word = 0; word < kMaskWords; ++word) {
        for (uint64_t left = found.changed[word]; left != 0; left &= left - 1) {
            const int place = 64 * word + std::countr_zero(left), by = now[place] - kept[place];
            const int entry = by < 0 ? place | kDownBit : place;
            for (int i = 0; i < std::abs(by); ++i) *to++ = static_cast<uint8_t>(entry);
        }
    }
    return to;
}

// Two bits for each changed value: down, and by two. What room is left lies within the words that
// are written.
QSDP_INLINE uint8_t* say_map(const Difference& found, int64_t count, int num_changed, int room,
                             uint8_t* to) {
    memcpy(to, found.changed, sizeof found.changed);
    uint8_t* const how = to + (count + 7) / 8;
    Mask down, by_two;
    gather_words(found.down, found.changed, down);
    gather_words(found.by_two, found.changed, by_two);
    int word = 0;
    do {
        uint64_t both[2];
        for (int half = 0; half < 2; ++half) {
            both[half] = to_even_bits(down[word] >> 32 * half) |
                         to_even_bits(by_two[word] >> 32 * half) << 1;
        }
        memcpy(how + word * sizeof both, both, sizeof both);
    } while (64 * ++word < num_changed);
    return how + (room + 3) / 4;
}

// Writes the shortest at ``to``, which moves behind it, and returns the bucket's count byte. Where
// nothing has changed that is a list of nothing.
QSDP_INLINE int say_changes(const Difference& found, int num_changed, uint8_t* now,
                            const uint8_t* kept, int64_t count, int bits, uint8_t*& to) {
    const int num_by_two = count_bits(found.by_two);
    // No form is shorter than a bit a value.
    if (num_by_two == 0 && 8 * num_changed <= count && num_changed <= kMostInNibble) {
        to = say_ones(found, to);
        return num_changed;
    }
    int64_t num_entries = num_changed + num_by_two;
    if (found.by_more) {
        num_entries = 0;
        for (int64_t i = 0; i < count; ++i) num_entries += std::abs(now[i] - kept[i]);
    }
    const int head = shortest(num_entries, num_changed, found.by_more, count, bits);
    if (head > kMostListed) {
        to = head == kWhole ? say_codes(now, count, bits, to)
                            : say_map(found, count, num_changed, head - kMostListed, to);
    } else {
        to = head == num_changed ? say_ones(found, to) : say_list(found, now, kept, to);
    }
    return head;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
