// The vector interface in plain C++: any machine. Arrays of eight lanes, so that
// a compiler may use whatever the platform's baseline has.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/portable.h"

namespace qsdp::scalar {

constexpr int kLanes = 8, kBlock = 4 * kLanes, kPhiloxLanes = kBlock / 8;

struct F {
    float lane[kLanes];
};
struct I {
    uint32_t lane[kLanes];
};
struct U {
    uint64_t lane[kPhiloxLanes];
};
struct Codes {
    uint8_t lane[kBlock];
};

#define QSDP_LANES(i) for (int i = 0; i < kLanes; ++i)

QSDP_INLINE F splat(float value) {
    F out;
    QSDP_LANES(i) out.lane[i] = value;
    return out;
}
template <class T>
QSDP_INLINE F load(const uint8_t* from, T) {
    T items[kLanes];
    memcpy(items, from, sizeof items);
    F out;
    QSDP_LANES(i) out.lane[i] = widen(items[i]);
    return out;
}
template <class T>
QSDP_INLINE void store(uint8_t* to, F value, T) {
    T items[kLanes];
    QSDP_LANES(i) narrow(value.lane[i], items[i]);
    memcpy(to, items, sizeof items);
}
QSDP_INLINE F add(F a, F b) {
    QSDP_LANES(i) a.lane[i] += b.lane[i];
    return a;
}
QSDP_INLINE F sub(F a, F b) {
    QSDP_LANES(i) a.lane[i] -= b.lane[i];
    return a;
}
QSDP_INLINE F mul(F a, F b) {
    QSDP_LANES(i) a.lane[i] *= b.lane[i];
    return a;
}
// NaN in the second argument is kept, as by x86's min and max.
QSDP_INLINE F min(F a, F b) {
    QSDP_LANES(i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
QSDP_INLINE F max(F a, F b) {
    QSDP_LANES(i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
QSDP_INLINE F replace_zeros(F x, F other) {
    QSDP_LANES(i) x.lane[i] = x.lane[i] == 0.0f ? other.lane[i] : x.lane[i];
    return x;
}
QSDP_INLINE F zero_where_equal(F value, F a, F b) {
    QSDP_LANES(i) value.lane[i] = a.lane[i] == b.lane[i] ? 0.0f : value.lane[i];
    return value;
}
// With each bit of ``signs`` flipped, one a lane.
QSDP_INLINE F flip(F x, const uint32_t* signs) {
    QSDP_LANES(i) x.lane[i] = bits_float(float_bits(x.lane[i]) ^ signs[i]);
    return x;
}
// Of the lanes i and i + H, where i has no bit H, their sum and the first less the second.
template <int H>
QSDP_INLINE F sum_and_difference(F x) {
    F out;
    QSDP_LANES(i) out.lane[i] = i & H ? x.lane[i ^ H] - x.lane[i] : x.lane[i] + x.lane[i ^ H];
    return out;
}
QSDP_INLINE F canonical(F x) {
    QSDP_LANES(i) x.lane[i] = qsdp::canonical(x.lane[i]);
    return x;
}
QSDP_INLINE float least(F x) {
    float out = x.lane[0];
    QSDP_LANES(i) out = x.lane[i] < out ? x.lane[i] : out;
    return out;
}
QSDP_INLINE float greatest(F x) {
    float out = x.lane[0];
    QSDP_LANES(i) out = x.lane[i] > out ? x.lane[i] : out;
    return out;
}

QSDP_INLINE I splat_bits(uint32_t value) {
    I out;
    QSDP_LANES(i) out.lane[i] = value;
    return out;
}
QSDP_INLINE I magnitude_bits(F x) {
    I out;
    memcpy(&out, &x, sizeof out);
    QSDP_LANES(i) out.lane[i] &= 0x7FFFFFFFu;
    return out;
}
QSDP_INLINE I min(I a, I b) {
    QSDP_LANES(i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
QSDP_INLINE I max(I a, I b) {
    QSDP_LANES(i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
QSDP_INLINE uint32_t least(I x) {
    uint32_t out = x.lane[0];
    QSDP_LANES(i) out = x.lane[i] < out ? x.lane[i] : out;
    return out;
}
QSDP_INLINE uint32_t greatest(I x) {
    uint32_t out = x.lane[0];
    QSDP_LANES(i) out = x.lane[i] > out ? x.lane[i] : out;
    return out;
}

// Half-even or toward zero, saturated to 0..255. Rounding is monotone and keeps whole numbers, so
// saturating first is the same; then adding 1.5 * 2**23 leaves the rounded number in the low bits.
template <bool Truncate>
QSDP_INLINE Codes to_codes(const F (&t)[4]) {
    Codes out;
    for (int v = 0; v < 4; ++v) {
        QSDP_LANES(i) {
            float value = t[v].lane[i] > 0.0f ? t[v].lane[i] : 0.0f;
            value = value < 255.0f ? value : 255.0f;
            const int32_t code = Truncate ? static_cast<int32_t>(value)
                                          : static_cast<int32_t>(float_bits(value + 0x1.8p23f));
            out.lane[v * kLanes + i] = static_cast<uint8_t>(code);
        }
    }
    return out;
}
QSDP_INLINE Codes to_codes(const I (&index)[4]) {
    Codes out;
    for (int v = 0; v < 4; ++v) {
        QSDP_LANES(i) out.lane[v * kLanes + i] = static_cast<uint8_t>(index[v].lane[i]);
    }
    return out;
}
QSDP_INLINE Codes splat_codes(int value) {
    Codes out;
    memset(&out, value, sizeof out);
    return out;
}
QSDP_INLINE Codes min(Codes a, Codes b) {
    for (int i = 0; i < kBlock; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
// ``last`` is all ones, so that OR puts it where x is zero.
QSDP_INLINE Codes mark_zeros(Codes codes, const F (&x)[4], Codes last) {
    for (int v = 0; v < 4; ++v) {
        QSDP_LANES(i) {
            if (x[v].lane[i] == 0.0f) codes.lane[v * kLanes + i] = last.lane[v * kLanes + i];
        }
    }
    return codes;
}
QSDP_INLINE void store(uint8_t* to, Codes codes) {
    memcpy(to, &codes, sizeof codes);
}
QSDP_INLINE Codes load_codes(const uint8_t* from) {
    Codes out;
    memcpy(&out, from, sizeof out);
    return out;
}
// Sums and differences stop at 255 and at 0.
QSDP_INLINE Codes add(Codes a, Codes b) {
    for (int i = 0; i < kBlock; ++i) {
        const int sum = a.lane[i] + b.lane[i];
        a.lane[i] = static_cast<uint8_t>(sum < 255 ? sum : 255);
    }
    return a;
}
QSDP_INLINE Codes sub(Codes a, Codes b) {
    for (int i = 0; i < kBlock; ++i) {
        const int apart = a.lane[i] - b.lane[i];
        a.lane[i] = static_cast<uint8_t>(apart > 0 ? apart : 0);
    }
    return a;
}
// |a - b|
QSDP_INLINE Codes distance(Codes a, Codes b) {
    for (int i = 0; i < kBlock; ++i) {
        const int apart = a.lane[i] - b.lane[i];
        a.lane[i] = static_cast<uint8_t>(apart < 0 ? -apart : apart);
    }
    return a;
}
// The highest bit of each of eight bytes: whether it is not 0.
QSDP_INLINE uint64_t nonzero_bytes(uint64_t bytes) {
    constexpr uint64_t kLowBits = 0x7F7F7F7F7F7F7F7Fu;
    return (((bytes & kLowBits) + kLowBits) | bytes) & ~kLowBits;
}
// The codes whose bit is set, 0 for the others; bits past the last are left out.
QSDP_INLINE Codes where(uint64_t bits, Codes codes) {
    for (int i = 0; i < kBlock; i += 8) {
        const uint64_t all = (bits >> i & 0xFF) * 0x0101010101010101u;
        const uint64_t mask = (nonzero_bytes(all & 0x8040201008040201u) >> 7) * 0xFF;
        uint64_t eight;
        memcpy(&eight, codes.lane + i, 8);
        eight &= mask;
        memcpy(codes.lane + i, &eight, 8);
    }
    return codes;
}
// A bit a code.
QSDP_INLINE uint64_t not_equal(Codes a, Codes b) {
    uint64_t bits = 0;
    for (int i = 0; i < kBlock; i += 8) {
        uint64_t x, y;
        memcpy(&x, a.lane + i, 8);
        memcpy(&y, b.lane + i, 8);
        bits |= (nonzero_bytes(x ^ y) >> 7) * 0x0102040810204080u >> 56 << i;
    }
    return bits;
}
QSDP_INLINE F widen_codes(const uint8_t* from) {
    F out;
    QSDP_LANES(i) out.lane[i] = static_cast<float>(from[i]);
    return out;
}
QSDP_INLINE I widen_indices(const uint8_t* from) {
    I out;
    QSDP_LANES(i) out.lane[i] = from[i];
    return out;
}
// Entry index % 2**Bits of a table that repeats itself after 2**Bits entries, up to 16 at least.
template <int Bits>
QSDP_INLINE F look_up(const float* table, I index) {
    F out;
    QSDP_LANES(i) out.lane[i] = table[index.lane[i] % (1u << Bits)];
    return out;
}
// A step of a bisection: where middle <= t it bounds t from below, else from above; the index gains
// the answer as its lowest bit.
QSDP_INLINE void bisect(F middle, F t, F& below, F& above, I& index) {
    // Not by ?:, which compilers turn into branches that no machine can foresee.
    QSDP_LANES(i) {
        const uint32_t reached = 0u - (middle.lane[i] <= t.lane[i]);
        const uint32_t bits = float_bits(middle.lane[i]);
        below.lane[i] = bits_float((bits & reached) | (float_bits(below.lane[i]) & ~reached));
        above.lane[i] = bits_float((bits & ~reached) | (float_bits(above.lane[i]) & reached));
        index.lane[i] = 2 * index.lane[i] - reached;
    }
}
// index + (a < b)
QSDP_INLINE I add_where_less(I index, F a, F b) {
    QSDP_LANES(i) index.lane[i] += a.lane[i] < b.lane[i];
    return index;
}

QSDP_INLINE U splat64(uint64_t value) {
    U out;
    for (auto& lane : out.lane) lane = value;
    return out;
}
QSDP_INLINE U mul32(U a, U b) {
    for (int i = 0; i < kPhiloxLanes; ++i) a.lane[i] = (a.lane[i] & 0xFFFFFFFFu) * b.lane[i];
    return a;
}
QSDP_INLINE U high32(U a) {
    for (auto& lane : a.lane) lane >>= 32;
    return a;
}
QSDP_INLINE U xor3(U a, U b, U c) {
    for (int i = 0; i < kPhiloxLanes; ++i) a.lane[i] ^= b.lane[i] ^ c.lane[i];
    return a;
}
// Philox block numbers, low words only, in the order that half_floats expects.
QSDP_INLINE U block_numbers(uint32_t first) {
    U out;
    for (int i = 0; i < kPhiloxLanes; ++i) out.lane[i] = first + static_cast<uint32_t>(i);
    return out;
}
// Half word k of the blocks, in order, as 128 + k / 2**16.
QSDP_INLINE void half_floats(U w0, U w1, U w2, U w3, F (&out)[4]) {
    const U* words[] = {&w0, &w1, &w2, &w3};
    for (int v = 0; v < 4; ++v) {
        QSDP_LANES(i) {
            const uint64_t word = words[i / 2]->lane[v];
            out[v].lane[i] = bits_float(0x43000000u | (word >> i % 2 * 16 & 0xFFFFu));
        }
    }
}

// Eight codes of a byte each, all below 2**Bits, to the low 8 * Bits bits of a stream; and back.
template <int Bits>
QSDP_INLINE uint64_t pack8(uint64_t codes) {
    uint64_t stream = 0;
    for (int i = 0; i < 8; ++i) stream |= (codes >> 8 * i & 0xFF) << Bits * i;
    return stream;
}
template <int Bits>
QSDP_INLINE uint64_t unpack8(uint64_t stream) {
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) codes |= (stream >> Bits * i & ((1u << Bits) - 1)) << 8 * i;
    return codes;
}
// The bits of ``bits`` where ``mask`` has ones, next to each other; and back.
QSDP_INLINE uint64_t gather_bits(uint64_t bits, uint64_t mask) {
    uint64_t out = 0;
    for (int i = 0; mask != 0; mask &= mask - 1, ++i) {
        out |= uint64_t{(bits & mask & (0 - mask)) != 0} << i;
    }
    return out;
}
QSDP_INLINE uint64_t scatter_bits(uint64_t bits, uint64_t mask) {
    uint64_t out = 0;
    for (; mask != 0; mask &= mask - 1, bits >>= 1) out |= mask & (0 - mask) & (0 - (bits & 1));
    return out;
}
// Bits 0, 2 to 62, next to each other; and back from bits 0 to 31.
QSDP_INLINE uint64_t even_bits(uint64_t bits) {
    uint64_t x = bits & 0x5555555555555555u;
    x = (x | x >> 1) & 0x3333333333333333u;
    x = (x | x >> 2) & 0x0F0F0F0F0F0F0F0Fu;
    x = (x | x >> 4) & 0x00FF00FF00FF00FFu;
    x = (x | x >> 8) & 0x0000FFFF0000FFFFu;
    return (x | x >> 16) & 0x00000000FFFFFFFFu;
}
QSDP_INLINE uint64_t to_even_bits(uint64_t bits) {
    uint64_t x = bits & 0x00000000FFFFFFFFu;
    x = (x | x << 16) & 0x0000FFFF0000FFFFu;
    x = (x | x << 8) & 0x00FF00FF00FF00FFu;
    x = (x | x << 4) & 0x0F0F0F0F0F0F0F0Fu;
    x = (x | x << 2) & 0x3333333333333333u;
    return (x | x << 1) & 0x5555555555555555u;
}
// Bits 0 to 3, each as the highest bit of a byte.
QSDP_INLINE uint32_t to_highest_bits(uint64_t bits) {
    return (static_cast<uint32_t>(bits & 0xF) * 0x00204081u & 0x01010101u) << 7;
}
// 32 codes of four bits.
QSDP_INLINE void pack32_nibbles(const uint8_t* codes, uint8_t* to) {
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}
QSDP_INLINE void unpack32_nibbles(const uint8_t* from, uint8_t* codes) {
    for (int i = 0; i < 32; ++i) codes[i] = from[i / 2] >> i % 2 * 4 & 0xF;
}

// A block of them.
QSDP_INLINE void unpack_nibbles(const uint8_t* from, uint8_t* codes) {
    unpack32_nibbles(from, codes);
}

#undef QSDP_LANES

}  // namespace qsdp::scalar
