// The vector interface for AVX-512 (F, BW, DQ, VL), BMI2 and F16C; meanings in
// simd_scalar.h.
#pragma once

#if defined(QSDP_EMULATE_AVX512)
#include "avx512_emulation.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "common/half.h"
#include "common/portable.h"
#include "cpu/pack_x86.h"

namespace qsdp::avx512 {

constexpr int kLanes = 16, kBlock = 4 * kLanes, kPhiloxLanes = kBlock / 8;

struct F {
    __m512 v;
};
struct I {
    __m512i v;
};
struct U {
    __m512i v;
};
struct Codes {
    __m512i v;
};

QSDP_INLINE __m128i load128(const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
QSDP_INLINE __m256i load256(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
QSDP_INLINE void store256(uint8_t* to, __m256i value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}
QSDP_INLINE __mmask16 is_zero(F x) {
    return _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_EQ_OQ);
}
QSDP_INLINE __mmask16 is_nan(F x) {
    return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
}

QSDP_INLINE F splat(float value) {
    return {_mm512_set1_ps(value)};
}
QSDP_INLINE F load(const uint8_t* from, float) {
    return {_mm512_castsi512_ps(_mm512_loadu_si512(from))};
}
QSDP_INLINE F load(const uint8_t* from, Bf16) {
    const __m512i wide = _mm512_cvtepu16_epi32(load256(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
QSDP_INLINE F load(const uint8_t* from, Fp16) {
    const F wide = {_mm512_cvtph_ps(load256(from))};
    const __m512 quiet = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000));
    return {_mm512_mask_blend_ps(is_nan(wide), wide.v, quiet)};
}
QSDP_INLINE void store(uint8_t* to, F value, float) {
    _mm512_storeu_si512(to, _mm512_castps_si512(value.v));
}
QSDP_INLINE void store(uint8_t* to, F value, Bf16) {
    const __m512i bits = _mm512_castps_si512(value.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i quiet = _mm512_set1_epi32(0x7FC0);
    store256(to, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan(value), rounded, quiet)));
}
QSDP_INLINE void store(uint8_t* to, F value, Fp16) {
    const __m512 quiet = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000));
    const __m512 canonical = _mm512_mask_blend_ps(is_nan(value), value.v, quiet);
    store256(to, _mm512_cvtps_ph(canonical, _MM_FROUND_TO_NEAREST_INT));
}
QSDP_INLINE F add(F a, F b) {
    return {_mm512_add_ps(a.v, b.v)};
}
QSDP_INLINE F sub(F a, F b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
QSDP_INLINE F mul(F a, F b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
QSDP_INLINE F min(F a, F b) {
    return {_mm512_min_ps(a.v, b.v)};
}
QSDP_INLINE F max(F a, F b) {
    return {_mm512_max_ps(a.v, b.v)};
}
QSDP_INLINE F replace_zeros(F x, F other) {
    return {_mm512_mask_blend_ps(is_zero(x), x.v, other.v)};
}
QSDP_INLINE F zero_where_equal(F value, F a, F b) {
    const __mmask16 equal = _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
    return {_mm512_mask_blend_ps(equal, value.v, _mm512_setzero_ps())};
}
QSDP_INLINE F flip(F x, const uint32_t* signs) {
    const __m512i mask = _mm512_loadu_si512(signs);
    return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x.v), mask))};
}
template <int H>
QSDP_INLINE F sum_and_difference(F x) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i bit = _mm512_set1_epi32(H);
    const __mmask16 is_second = _mm512_test_epi32_mask(lane, bit);
    const __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, bit), x.v);
    return {_mm512_mask_blend_ps(is_second, _mm512_add_ps(other, x.v), _mm512_sub_ps(other, x.v))};
}
QSDP_INLINE F canonical(F x) {
    const __m512 quiet = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000));
    return {_mm512_mask_blend_ps(is_nan(x), x.v, quiet)};
}
QSDP_INLINE float least(F x) {
    return _mm512_reduce_min_ps(x.v);
}
QSDP_INLINE float greatest(F x) {
    return _mm512_reduce_max_ps(x.v);
}

QSDP_INLINE I splat_bits(uint32_t value) {
    return {_mm512_set1_epi32(static_cast<int>(value))};
}
QSDP_INLINE I magnitude_bits(F x) {
    return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7FFFFFFF))};
}
QSDP_INLINE I min(I a, I b) {
    return {_mm512_min_epu32(a.v, b.v)};
}
QSDP_INLINE I max(I a, I b) {
    return {_mm512_max_epu32(a.v, b.v)};
}
QSDP_INLINE uint32_t least(I x) {
    return _mm512_reduce_min_epu32(x.v);
}
QSDP_INLINE uint32_t greatest(I x) {
    return _mm512_reduce_max_epu32(x.v);
}

QSDP_INLINE Codes to_codes(const I (&index)[4]) {
    const __m512i low = _mm512_packs_epi32(index[0].v, index[1].v);
    const __m512i high = _mm512_packs_epi32(index[2].v, index[3].v);
    // Packing interleaves 128-bit lanes; the permutation puts the bytes back in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high))};
}
template <bool Truncate>
QSDP_INLINE Codes to_codes(const F (&t)[4]) {
    I code[4];
    for (int v = 0; v < 4; ++v) {
        code[v].v = Truncate ? _mm512_cvttps_epi32(t[v].v) : _mm512_cvtps_epi32(t[v].v);
    }
    return to_codes(code);
}
QSDP_INLINE Codes splat_codes(int value) {
    return {_mm512_set1_epi8(static_cast<char>(value))};
}
QSDP_INLINE Codes min(Codes a, Codes b) {
    return {_mm512_min_epu8(a.v, b.v)};
}
QSDP_INLINE Codes mark_zeros(Codes codes, const F (&x)[4], Codes last) {
    uint64_t zero = 0;
    for (int v = 0; v < 4; ++v) zero |= uint64_t{is_zero(x[v])} << 16 * v;
    return {_mm512_mask_blend_epi8(zero, codes.v, last.v)};
}
QSDP_INLINE void store(uint8_t* to, Codes codes) {
    _mm512_storeu_si512(to, codes.v);
}
QSDP_INLINE Codes load_codes(const uint8_t* from) {
    return {_mm512_loadu_si512(from)};
}
QSDP_INLINE Codes add(Codes a, Codes b) {
    return {_mm512_adds_epu8(a.v, b.v)};
}
QSDP_INLINE Codes sub(Codes a, Codes b) {
    return {_mm512_subs_epu8(a.v, b.v)};
}
QSDP_INLINE Codes where(uint64_t bits, Codes codes) {
    return {_mm512_mask_blend_epi8(bits, _mm512_set1_epi8(0), codes.v)};
}
QSDP_INLINE Codes distance(Codes a, Codes b) {
    return {_mm512_or_si512(_mm512_subs_epu8(a.v, b.v), _mm512_subs_epu8(b.v, a.v))};
}
QSDP_INLINE uint64_t not_equal(Codes a, Codes b) {
    return _mm512_cmpneq_epu8_mask(a.v, b.v);
}
QSDP_INLINE I widen_indices(const uint8_t* from) {
    return {_mm512_cvtepu8_epi32(load128(from))};
}
QSDP_INLINE F widen_codes(const uint8_t* from) {
    return {_mm512_cvtepi32_ps(widen_indices(from).v)};
}
template <int Bits>
QSDP_INLINE F look_up(const float* table, I index) {
    const __m512 low = load(reinterpret_cast<const uint8_t*>(table), float{}).v;
    if constexpr (Bits <= 4) {
        return {_mm512_permutexvar_ps(index.v, low)};
    } else if constexpr (Bits == 5) {
        const __m512 high = load(reinterpret_cast<const uint8_t*>(table + 16), float{}).v;
        return {_mm512_permutex2var_ps(low, index.v, high)};
    } else {
        const __mmask16 is_high = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(32));
        const F upper = look_up<5>(table + 32, index);
        return {_mm512_mask_blend_ps(is_high, look_up<5>(table, index).v, upper.v)};
    }
}
QSDP_INLINE void bisect(F middle, F t, F& below, F& above, I& index) {
    const __mmask16 reached = _mm512_cmp_ps_mask(middle.v, t.v, _CMP_LE_OQ);
    below.v = _mm512_mask_blend_ps(reached, below.v, middle.v);
    above.v = _mm512_mask_blend_ps(reached, middle.v, above.v);
    const __m512i doubled = _mm512_add_epi32(index.v, index.v);
    index.v = _mm512_mask_add_epi32(doubled, reached, doubled, _mm512_set1_epi32(1));
}
QSDP_INLINE I add_where_less(I index, F a, F b) {
    const __mmask16 less = _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
    return {_mm512_mask_add_epi32(index.v, less, index.v, _mm512_set1_epi32(1))};
}

QSDP_INLINE U splat64(uint64_t value) {
    return {_mm512_set1_epi64(static_cast<long long>(value))};
}
QSDP_INLINE U mul32(U a, U b) {
    return {_mm512_mul_epu32(a.v, b.v)};
}
QSDP_INLINE U high32(U a) {
    return {_mm512_srli_epi64(a.v, 32)};
}
QSDP_INLINE U xor3(U a, U b, U c) {
    return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)};
}
// Even lanes are blocks 0 to 3, odd ones 4 to 7: unpacking then leaves each half in order.
QSDP_INLINE U block_numbers(uint32_t first) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    return {_mm512_add_epi64(_mm512_set1_epi64(first), order)};
}
QSDP_INLINE void half_floats(U w0, U w1, U w2, U w3, F (&out)[4]) {
    const __m512i exponent = _mm512_set1_epi32(0x43000000);
    const __m512i first = _mm512_mask_blend_epi32(0xAAAA, w0.v, _mm512_slli_epi64(w1.v, 32));
    const __m512i second = _mm512_mask_blend_epi32(0xAAAA, w2.v, _mm512_slli_epi64(w3.v, 32));
    const __m512i halves[] = {_mm512_unpacklo_epi64(first, second),
                              _mm512_unpackhi_epi64(first, second)};
    for (int v = 0; v < 4; ++v) {
        const __m256i sixteen = v % 2 ? _mm512_extracti64x4_epi64(halves[v / 2], 1)
                                      : _mm512_castsi512_si256(halves[v / 2]);
        const __m512i bits = _mm512_or_si512(_mm512_cvtepu16_epi32(sixteen), exponent);
        out[v].v = _mm512_castsi512_ps(bits);
    }
}

// A block of codes of four bits.
QSDP_INLINE void unpack_nibbles(const uint8_t* from, uint8_t* codes) {
    const __m512i bytes = _mm512_cvtepu8_epi16(load256(from));
    const __m512i pairs = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
    _mm512_storeu_si512(codes, _mm512_and_si512(pairs, _mm512_set1_epi8(0x0F)));
}

using x86::even_bits, x86::gather_bits, x86::scatter_bits, x86::to_even_bits, x86::to_highest_bits;
using x86::pack32_nibbles, x86::pack8, x86::unpack32_nibbles, x86::unpack8;

}  // namespace qsdp::avx512
