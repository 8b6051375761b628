// One row of the table of spans, stretches of values of which a mask keeps some; see `Span` in
// qsdp/ops/reference/sparse.py for the columns.
#pragma once

#include <bit>
#include <cstdint>

#include "common/portable.h"

namespace qsdp {

struct Span {
    int64_t dense_byte;
    int64_t numel;
    int64_t item;  // bytes of a value: 1, 2 or 4
    int64_t bitmap_byte;
    int64_t compact_byte;
    int64_t count;
};

constexpr int64_t kSpanFields = sizeof(Span) / sizeof(int64_t);

// Calls ``work`` with a word of ``item`` bytes, as a value has.
template <class Work>
QSDP_INLINE void with_item(int64_t item, const Work& work) {
    if (item == 4) return work(uint32_t{});
    if (item == 2) return work(uint16_t{});
    work(uint8_t{});
}

// The mask of the values [8 * byte, 8 * byte + 8), those past the end left out.
QSDP_INLINE uint32_t mask_byte(const uint8_t* bitmap, int64_t byte, int64_t numel) {
    const int64_t left = numel - 8 * byte;
    return bitmap[byte] & (left < 8 ? (1u << left) - 1 : 0xFFu);
}

static inline int64_t count_bits(const uint8_t* bitmap, int64_t numel) {
    int64_t count = 0;
    for (int64_t byte = 0; 8 * byte < numel; ++byte) {
        count += std::popcount(mask_byte(bitmap, byte, numel));
    }
    return count;
}

}  // namespace qsdp
