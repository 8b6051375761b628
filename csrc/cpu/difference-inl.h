// Where the codes of a bucket differ from the kept ones, a bit a value.
#pragma once

#include <bit>
#include <cstdint>

#include "common/segment.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

constexpr int kMaskWords = kMostKept / 64;
using Mask = uint64_t[kMaskWords];

struct Difference {
    Mask changed, down, by_two;  // by_two: or by more
    bool by_more;                // whether some are
};

QSDP_INLINE int count_bits(const Mask& mask) {
    int sum = 0;
    for (const uint64_t word : mask) sum += std::popcount(word);
    return sum;
}

// The bits of ``bits`` where ``mask`` has ones, next to each other.
QSDP_INLINE void gather_words(const Mask& bits, const Mask& mask, Mask& out) {
    static_assert(kMaskWords == 2);
    const int first = std::popcount(mask[0]);
    const uint64_t low = gather_bits(bits[0], mask[0]), high = gather_bits(bits[1], mask[1]);
    out[0] = first == 64 ? low : low | high << first;
    out[1] = first == 0 ? 0 : high >> (64 - first);
}

// Which codes have changed, of kMostKept, one a byte; whether any have. Behind the last value both
// arrays hold the same.
QSDP_INLINE bool find_changed(const uint8_t* now, const uint8_t* kept, Mask& found) {
    for (uint64_t& word : found) word = 0;
    for (int i = 0; i < kMostKept; i += kBlock) {
        found[i / 64] |= not_equal(load_codes(now + i), load_codes(kept + i)) << i % 64;
    }
    uint64_t any = 0;
    for (const uint64_t word : found) any |= word;
    return any != 0;
}

// And how they have.
QSDP_INLINE void find_how(const uint8_t* now, const uint8_t* kept, Difference& found) {
    const Codes one = splat_codes(1), two = splat_codes(2);
    for (int word = 0; word < kMaskWords; ++word) found.down[word] = found.by_two[word] = 0;
    uint64_t by_more = 0;
    for (int i = 0; i < kMostKept; i += kBlock) {
        const Codes a = load_codes(now + i), b = load_codes(kept + i), apart = distance(a, b);
        found.down[i / 64] |= not_equal(min(a, b), b) << i % 64;
        found.by_two[i / 64] |= not_equal(min(apart, one), apart) << i % 64;
        by_more |= not_equal(min(apart, two), apart) << i % 64;
    }
    found.by_more = by_more != 0;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
