// The vector interface for AVX2, BMI2 and F16C; meanings in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/half.h"
#include "common/portable.h"
#include "cpu/pack_x86.h"

namespace qsdp::avx2 {

constexpr int kLanes = 8, kBlock = 4 * kLanes, kPhiloxLanes = kBlock / 8;

struct F {
    __m256 v;
};
struct I {
    __m256i v;
};
struct U {
    __m256i v;
};
struct Codes {
    __m256i v;
};

QSDP_INLINE __m128i load128(const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
QSDP_INLINE F splat(float value) {
    return {_mm256_set1_ps(value)};
}
QSDP_INLINE F load(const uint8_t* from, float) {
    return {_mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
QSDP_INLINE F load(const uint8_t* from, Bf16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(from)), 16))};
}
QSDP_INLINE F load(const uint8_t* from, Fp16) {
    const __m256 wide = _mm256_cvtph_ps(load128(from));
    const __m256 nan = _mm256_cmp_ps(wide, wide, _CMP_UNORD_Q);
    return {_mm256_blendv_ps(wide, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), nan)};
}
QSDP_INLINE void store(uint8_t* to, F value, float) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_castps_si256(value.v));
}
QSDP_INLINE void store(uint8_t* to, F value, Bf16) {
    const __m256i bits = _mm256_castps_si256(value.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value.v, value.v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(halves));
}
QSDP_INLINE void store(uint8_t* to, F value, Fp16) {
    const __m256 nan = _mm256_cmp_ps(value.v, value.v, _CMP_UNORD_Q);
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
    const __m256 canonical = _mm256_blendv_ps(value.v, quiet, nan);
    const __m128i halves = _mm256_cvtps_ph(canonical, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
QSDP_INLINE F add(F a, F b) {
    return {_mm256_add_ps(a.v, b.v)};
}
QSDP_INLINE F sub(F a, F b) {
    return {_mm256_sub_ps(a.v, b.v)};
}
QSDP_INLINE F mul(F a, F b) {
    return {_mm256_mul_ps(a.v, b.v)};
}
QSDP_INLINE F min(F a, F b) {
    return {_mm256_min_ps(a.v, b.v)};
}
QSDP_INLINE F max(F a, F b) {
    return {_mm256_max_ps(a.v, b.v)};
}
QSDP_INLINE F replace_zeros(F x, F other) {
    const __m256 zero = _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return {_mm256_blendv_ps(x.v, other.v, zero)};
}
QSDP_INLINE F zero_where_equal(F value, F a, F b) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ), value.v)};
}
QSDP_INLINE F flip(F x, const uint32_t* signs) {
    return {_mm256_xor_ps(x.v, _mm256_loadu_ps(reinterpret_cast<const float*>(signs)))};
}
template <int H>
QSDP_INLINE F sum_and_difference(F x) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bit = _mm256_set1_epi32(H);
    const __m256i is_second = _mm256_cmpeq_epi32(_mm256_and_si256(lane, bit), bit);
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(is_second, 31));
    const __m256 other = _mm256_permutevar8x32_ps(x.v, _mm256_xor_si256(lane, bit));
    return {_mm256_add_ps(other, _mm256_xor_ps(x.v, sign))};
}
QSDP_INLINE F canonical(F x) {
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
    return {_mm256_blendv_ps(x.v, quiet, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}
QSDP_INLINE float least(F x) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
QSDP_INLINE float greatest(F x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

QSDP_INLINE I splat_bits(uint32_t value) {
    return {_mm256_set1_epi32(static_cast<int>(value))};
}
QSDP_INLINE I magnitude_bits(F x) {
    return {_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7FFFFFFF))};
}
QSDP_INLINE I min(I a, I b) {
    return {_mm256_min_epu32(a.v, b.v)};
}
QSDP_INLINE I max(I a, I b) {
    return {_mm256_max_epu32(a.v, b.v)};
}
QSDP_INLINE uint32_t least(I x) {
    __m128i m = _mm_min_epu32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    m = _mm_min_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_min_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
QSDP_INLINE uint32_t greatest(I x) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

// Packing interleaves 128-bit lanes; this puts the bytes back in order.
QSDP_INLINE __m256i in_order(__m256i packed) {
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
QSDP_INLINE Codes to_codes(const I (&index)[4]) {
    const __m256i low = _mm256_packs_epi32(index[0].v, index[1].v);
    const __m256i high = _mm256_packs_epi32(index[2].v, index[3].v);
    return {in_order(_mm256_packus_epi16(low, high))};
}
template <bool Truncate>
QSDP_INLINE Codes to_codes(const F (&t)[4]) {
    I code[4];
    for (int v = 0; v < 4; ++v) {
        code[v].v = Truncate ? _mm256_cvttps_epi32(t[v].v) : _mm256_cvtps_epi32(t[v].v);
    }
    return to_codes(code);
}
QSDP_INLINE Codes splat_codes(int value) {
    return {_mm256_set1_epi8(static_cast<char>(value))};
}
QSDP_INLINE Codes min(Codes a, Codes b) {
    return {_mm256_min_epu8(a.v, b.v)};
}
QSDP_INLINE Codes mark_zeros(Codes codes, const F (&x)[4], Codes last) {
    __m256i zero[4];
    for (int v = 0; v < 4; ++v) {
        zero[v] = _mm256_castps_si256(_mm256_cmp_ps(x[v].v, _mm256_setzero_ps(), _CMP_EQ_OQ));
    }
    const __m256i low = _mm256_packs_epi32(zero[0], zero[1]);
    const __m256i high = _mm256_packs_epi32(zero[2], zero[3]);
    const __m256i mask = in_order(_mm256_packs_epi16(low, high));
    return {_mm256_or_si256(codes.v, _mm256_and_si256(mask, last.v))};
}
QSDP_INLINE void store(uint8_t* to, Codes codes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes.v);
}
QSDP_INLINE Codes load_codes(const uint8_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
QSDP_INLINE Codes add(Codes a, Codes b) {
    return {_mm256_adds_epu8(a.v, b.v)};
}
QSDP_INLINE Codes sub(Codes a, Codes b) {
    return {_mm256_subs_epu8(a.v, b.v)};
}
QSDP_INLINE Codes where(uint64_t bits, Codes codes) {
    // Each byte of the bits eight times, of which each takes another bit.
    const __m256i low =
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    const __m256i own_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(all, low), own_bit);
    return {_mm256_and_si256(_mm256_cmpeq_epi8(own, own_bit), codes.v)};
}
QSDP_INLINE Codes distance(Codes a, Codes b) {
    return {_mm256_or_si256(_mm256_subs_epu8(a.v, b.v), _mm256_subs_epu8(b.v, a.v))};
}
QSDP_INLINE uint64_t not_equal(Codes a, Codes b) {
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a.v, b.v)));
}
QSDP_INLINE I widen_indices(const uint8_t* from) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))};
}
QSDP_INLINE F widen_codes(const uint8_t* from) {
    return {_mm256_cvtepi32_ps(widen_indices(from).v)};
}
template <int Bits>
QSDP_INLINE F look_up(const float* table, I index) {
    if constexpr (Bits <= 3) {
        return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index.v)};
    } else {
        const F low = look_up<Bits - 1>(table, index);
        const F high = look_up<Bits - 1>(table + (1 << (Bits - 1)), index);
        const __m256i highest_bit = _mm256_slli_epi32(index.v, 32 - Bits);
        return {_mm256_blendv_ps(low.v, high.v, _mm256_castsi256_ps(highest_bit))};
    }
}
QSDP_INLINE void bisect(F middle, F t, F& below, F& above, I& index) {
    const __m256 reached = _mm256_cmp_ps(middle.v, t.v, _CMP_LE_OQ);
    below.v = _mm256_blendv_ps(below.v, middle.v, reached);
    above.v = _mm256_blendv_ps(middle.v, above.v, reached);
    const __m256i doubled = _mm256_add_epi32(index.v, index.v);
    index.v = _mm256_sub_epi32(doubled, _mm256_castps_si256(reached));
}
QSDP_INLINE I add_where_less(I index, F a, F b) {
    const __m256i less = _mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
    return {_mm256_sub_epi32(index.v, less)};
}

QSDP_INLINE U splat64(uint64_t value) {
    return {_mm256_set1_epi64x(static_cast<long long>(value))};
}
QSDP_INLINE U mul32(U a, U b) {
    return {_mm256_mul_epu32(a.v, b.v)};
}
QSDP_INLINE U high32(U a) {
    return {_mm256_srli_epi64(a.v, 32)};
}
QSDP_INLINE U xor3(U a, U b, U c) {
    return {_mm256_xor_si256(a.v, _mm256_xor_si256(b.v, c.v))};
}
QSDP_INLINE U block_numbers(uint32_t first) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3))};
}
QSDP_INLINE void half_floats(U w0, U w1, U w2, U w3, F (&out)[4]) {
    const __m256i exponent = _mm256_set1_epi16(0x4300);
    // Half words 0 to 3, and 4 to 7, of the four blocks; then both of blocks 0 and 1, 2 and 3.
    const __m256i first = _mm256_blend_epi32(w0.v, _mm256_slli_epi64(w1.v, 32), 0xAA);
    const __m256i second = _mm256_blend_epi32(w2.v, _mm256_slli_epi64(w3.v, 32), 0xAA);
    const __m256i low = _mm256_permute2x128_si256(first, second, 0x20);
    const __m256i high = _mm256_permute2x128_si256(first, second, 0x31);
    out[0].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, exponent));
    out[1].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, exponent));
    out[2].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, exponent));
    out[3].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, exponent));
}

QSDP_INLINE void unpack_nibbles(const uint8_t* from, uint8_t* codes) {
    x86::unpack32_nibbles(from, codes);
}

using x86::even_bits, x86::gather_bits, x86::scatter_bits, x86::to_even_bits, x86::to_highest_bits;
using x86::pack32_nibbles, x86::pack8, x86::unpack32_nibbles, x86::unpack8;

}  // namespace qsdp::avx2
