// Philox4x32-7, one block at a time; see [Note: Keys] in qsdp/codec/random_numbers.py.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace qsdp {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 7;

// What a segment's random numbers depend on, besides the block number.
struct Stream {
    uint64_t key;
    uint32_t parameter, group;
};

struct PhiloxBlock {
    uint32_t word[4];
};

QSDP_INLINE PhiloxBlock philox(Stream stream, uint64_t block) {
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
    uint32_t c2 = stream.parameter, c3 = stream.group;
    uint32_t k0 = static_cast<uint32_t>(stream.key), k1 = static_cast<uint32_t>(stream.key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t product0 = uint64_t{c0} * kPhiloxMultiplier0;
        const uint64_t product1 = uint64_t{c2} * kPhiloxMultiplier1;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

// The 16-bit number of value or bucket ``index``: half word index % 8 of block index / 8.
QSDP_INLINE uint32_t half_word(const PhiloxBlock& block, uint64_t index) {
    return block.word[index % 8 / 2] >> (index % 2 * 16) & 0xFFFF;
}

// r = (k + 1/2) / 2**16 - 1/2; every step is exact.
QSDP_INLINE float centred(uint32_t half) {
    return (static_cast<float>(half) + 0.5f) * 0x1p-16f - 0.5f;
}

}  // namespace qsdp
