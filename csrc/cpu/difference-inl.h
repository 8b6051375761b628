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

// Of ``count`` codes, one a byte; both arrays may be read up to kMostKept.
QSDP_INLINE Difference difference(const uint8_t* now, const uint8_t* kept, int64_t count) {
    Difference found{};
    const Codes one = splat_codes(1), two = splat_codes(2);
    for (int64_t i = 0; i < count; i += kBlock) {
        const Codes a = load_codes(now + i), b = load_codes(kept + i), apart = distance(a, b);
        const int64_t word = i / 64, shift = i % 64, left = count - i;
        const uint64_t valid = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
        found.changed[word] |= (not_equal(a, b) & valid) << shift;
        found.down[word] |= (not_equal(min(a, b), b) & valid) << shift;
        found.by_two[word] |= (not_equal(min(apart, one), apart) & valid) << shift;
        found.by_more |= (not_equal(min(apart, two), apart) & valid) != 0;
    }
    return found;
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
