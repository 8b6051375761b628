// Random numbers of buckets and of values; see [Note: Keys] in qsdp/codec/random_numbers.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/philox.h"
#include "cpu/block-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// One number a bucket; eight buckets share a Philox block.
class Shifts {
  public:
    explicit Shifts(Stream stream) : stream_(stream) {}

    float at(int64_t bucket) {
        const uint64_t index = static_cast<uint64_t>(bucket);
        if (index / 8 != number_) {
            number_ = index / 8;
            block_ = philox(stream_, number_);
        }
        return centred(half_word(block_, index));
    }

  private:
    Stream stream_;
    uint64_t number_ = ~uint64_t{0};
    PhiloxBlock block_{};
};

// One number a value, as 128 + k / 2**16, from the block ``base`` on. Lanes hold 32-bit words with
// rubbish above them.
class Draws {
  public:
    Draws(Stream stream, uint64_t base) : stream_(stream), base_(base) {
        uint32_t k0 = static_cast<uint32_t>(stream.key);
        uint32_t k1 = static_cast<uint32_t>(stream.key >> 32);
        const uint64_t product1 = uint64_t{stream.parameter} * kPhiloxMultiplier1;
        same0_ = static_cast<uint32_t>(product1 >> 32) ^ k0;
        same1_ = splat64(static_cast<uint32_t>(product1));
        for (int round = 0; round < kPhiloxRounds; ++round) {
            key0_[round] = splat64(k0), key1_[round] = splat64(k1);
            k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
        }
    }

    // Those of ``Blocks`` blocks of values: several at once, for one alone waits on its multiplies.
    template <int Blocks>
    inline __attribute__((always_inline)) void draw(uint64_t first_value,
                                                    F (&out)[Blocks][4]) const {
        const uint64_t first = base_ + first_value / 8;
        const uint32_t number = static_cast<uint32_t>(first);
        if (number > UINT32_MAX - Blocks * kPhiloxLanes) {
            for (int b = 0; b < Blocks; ++b) draw_slowly(first + b * kPhiloxLanes, out[b]);
            return;
        }
        // Two of the four words are the same in every lane at first: they are worked on once.
        const uint32_t same0 = same0_ ^ static_cast<uint32_t>(first >> 32);
        const uint64_t product0 = uint64_t{same0} * kPhiloxMultiplier0;
        const U m0 = splat64(kPhiloxMultiplier0), m1 = splat64(kPhiloxMultiplier1);
        const U high_product0 = splat64(product0 >> 32), group = splat64(stream_.group);
        U p0[Blocks], p1[Blocks], w0[Blocks], w1[Blocks], w2[Blocks], w3[Blocks];
        for (int b = 0; b < Blocks; ++b) {
            p0[b] = mul32(block_numbers(number + b * kPhiloxLanes), m0);
            p1[b] = mul32(xor3(high32(p0[b]), group, key1_[0]), m1);
            w0[b] = xor3(high32(p1[b]), same1_, key0_[1]), w1[b] = p1[b];
            w2[b] = xor3(p0[b], high_product0, key1_[1]), w3[b] = splat64(product0);
        }
        for (int round = 2; round < kPhiloxRounds; ++round) {
            for (int b = 0; b < Blocks; ++b) p0[b] = mul32(w0[b], m0), p1[b] = mul32(w2[b], m1);
            for (int b = 0; b < Blocks; ++b) {
                w0[b] = xor3(high32(p1[b]), w1[b], key0_[round]), w1[b] = p1[b];
                w2[b] = xor3(high32(p0[b]), w3[b], key1_[round]), w3[b] = p0[b];
            }
        }
        for (int b = 0; b < Blocks; ++b) half_floats(w0[b], w1[b], w2[b], w3[b], out[b]);
    }

  private:
    // For block numbers that may carry into their high word, which the lanes above share.
    void draw_slowly(uint64_t first, F (&out)[4]) const {
        uint8_t bytes[sizeof(float) * kBlock];
        for (uint64_t i = 0; i < kBlock; ++i) {
            const uint32_t half = half_word(philox(stream_, first + i / 8), i);
            const float value = bits_float(0x43000000u | half);
            memcpy(bytes + i * sizeof value, &value, sizeof value);
        }
        load_block<float>(bytes, out);
    }

    Stream stream_;
    uint64_t base_;
    uint32_t same0_;
    U same1_, key0_[kPhiloxRounds], key1_[kPhiloxRounds];
};

}  // namespace
}  // namespace qsdp::QSDP_ISA
