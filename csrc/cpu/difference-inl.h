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

// Of ``count`` codes, one a byte; all kMostKept are read of both arrays.
QSDP_INLINE Difference difference(const uint8_t* now, const uint8_t* kept, int64_t count) {
    Difference found{};
    Mask by_more = {};
    const Codes one = splat_codes(1), two = splat_codes(2);
    for (int i = 0; i < kMostKept; i += kBlock) {
        const Codes a = load_codes(now + i), b = load_codes(kept + i), apart = distance(a, b);
        found.changed[i / 64] |= not_equal(a, b) << i % 64;
        found.down[i / 64] |= not_equal(min(a, b), b) << i % 64;
        found.by_two[i / 64] |= not_equal(min(apart, one), apart) << i % 64;
        by_more[i / 64] |= not_equal(min(apart, two), apart) << i % 64;
    }
    for (int word = 0; word < kMaskWords; ++word) {
        const int64_t left = count - 64 * word;
        const uint64_t valid = left >= 64  ? ~uint64_t{0}
                               : left <= 0 ? 0
                                           : (uint64_t{1} << left) - 1;
        found.changed[word] &= valid, found.by_two[word] &= valid;
        found.by_more |= (by_more[word] & valid) != 0;
    }
    return found;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
