// Codes of a byte each <-> a little-endian bit stream, with BMI2 and AVX2; meanings in
// simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/portable.h"

namespace qsdp::x86 {

template <int Bits>
QSDP_INLINE uint64_t pack8(uint64_t codes) {
    return _pext_u64(codes, 0x0101010101010101u * ((1u << Bits) - 1));
}
template <int Bits>
QSDP_INLINE uint64_t unpack8(uint64_t stream) {
    return _pdep_u64(stream, 0x0101010101010101u * ((1u << Bits) - 1));
}

QSDP_INLINE uint64_t gather_bits(uint64_t bits, uint64_t mask) {
    return _pext_u64(bits, mask);
}
QSDP_INLINE uint64_t scatter_bits(uint64_t bits, uint64_t mask) {
    return _pdep_u64(bits, mask);
}

QSDP_INLINE uint64_t even_bits(uint64_t bits) {
    return _pext_u64(bits, 0x5555555555555555u);
}
QSDP_INLINE uint64_t to_even_bits(uint64_t bits) {
    return _pdep_u64(bits, 0x5555555555555555u);
}
QSDP_INLINE uint32_t to_highest_bits(uint64_t bits) {
    return _pdep_u32(static_cast<uint32_t>(bits), 0x80808080u);
}

QSDP_INLINE void pack32_nibbles(const uint8_t* codes, uint8_t* to) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i bytes = _mm256_maddubs_epi16(pairs, _mm256_set1_epi16(0x1001));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(bytes, bytes), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
QSDP_INLINE void unpack32_nibbles(const uint8_t* from, uint8_t* codes) {
    const __m128i stream = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i bytes = _mm256_cvtepu8_epi16(stream);
    const __m256i pairs = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
    const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi8(0x0F));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), low);
}

}  // namespace qsdp::x86
