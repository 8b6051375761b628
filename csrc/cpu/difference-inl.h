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

// The bits of a word that are values, of ``count``.
QSDP_INLINE uint64_t values_in_word(int64_t count, int word) {
    const int64_t left = count - 64 * word;
    return left >= 64 ? ~uint64_t{0} : left <= 0 ? 0 : (uint64_t{1} << left) - 1;
}

// Which of ``count`` codes, one a byte, have changed; all kMostKept are read of both arrays.
QSDP_INLINE bool find_changed(const uint8_t* now, const uint8_t* kept, int64_t count, Mask& found) {
    for (uint64_t& word : found) word = 0;
    for (int i = 0; i < kMostKept; i += kBlock) {
        found[i / 64] |= not_equal(load_codes(now + i), load_codes(kept + i)) << i % 64;
    }
    uint64_t any = 0;
    for (int word = 0; word < kMaskWords; ++word) any |= found[word] &= values_in_word(count, word);
    return any != 0;
}

// And how they have.
QSDP_INLINE void find_how(const uint8_t* now, const uint8_t* kept, Difference& found) {
    const Codes one = splat_codes(1), two = splat_codes(2);
    Mask by_more = {};
    for (int word = 0; word < kMaskWords; ++word) found.down[word] = found.by_two[word] = 0;
    for (int i = 0; i < kMostKept; i += kBlock) {
        const Codes a = load_codes(now + i), b = load_codes(kept + i), apart = distance(a, b);
        found.down[i / 64] |= not_equal(min(a, b), b) << i % 64;
        found.by_two[i / 64] |= not_equal(min(apart, one), apart) << i % 64;
        by_more[i / 64] |= not_equal(min(apart, two), apart) << i % 64;
    }
    found.by_more = false;
    for (int word = 0; word < kMaskWords; ++word) {
        found.by_two[word] &= found.changed[word];
        found.by_more |= (by_more[word] & found.changed[word]) != 0;
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
