// Codes of a byte each to a stream of bits, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// ``codes`` may be read up to a multiple of eight. Bits past the last code are those of ``codes``.
template <int Bits>
void pack(const uint8_t* codes, int64_t count, uint8_t* to) {
    const int64_t num_bytes = (count * Bits + 7) / 8;
    int64_t i = 0;
    if constexpr (Bits == 4) {
        for (; i + 32 <= count; i += 32) pack32_nibbles(codes + i, to + i / 2);
    }
    uint64_t word;
    for (; i / 8 * Bits + 8 <= num_bytes; i += 8) {
        memcpy(&word, codes + i, 8);
        word = pack8<Bits>(word);
        memcpy(to + i / 8 * Bits, &word, 8);
    }
    for (; i < count; i += 8) {
        memcpy(&word, codes + i, 8);
        word = pack8<Bits>(word);
        const int64_t left = num_bytes - i / 8 * Bits;
        memcpy(to + i / 8 * Bits, &word, left < Bits ? left : Bits);
    }
}

template <int Bits>
void unpack(const uint8_t* from, int64_t count, uint8_t* codes) {
    const int64_t num_bytes = (count * Bits + 7) / 8;
    int64_t i = 0;
    if constexpr (Bits == 4) {
        for (; i + kBlock <= count; i += kBlock) unpack_nibbles(from + i / 2, codes + i);
        for (; i + 32 <= count; i += 32) unpack32_nibbles(from + i / 2, codes + i);
    }
    uint64_t word;
    for (; i / 8 * Bits + 8 <= num_bytes; i += 8) {
        memcpy(&word, from + i / 8 * Bits, 8);
        word = unpack8<Bits>(word);
        memcpy(codes + i, &word, 8);
    }
    for (; i < count; i += 8) {
        const int64_t left = num_bytes - i / 8 * Bits;
        word = 0;
        memcpy(&word, from + i / 8 * Bits, left < Bits ? left : Bits);
        word = unpack8<Bits>(word);
        memcpy(codes + i, &word, 8);
    }
}

using Pack = void (*)(const uint8_t*, int64_t, uint8_t*);

// By the bits of a code; 8 bits need no packing.
constexpr Pack kPack[] = {nullptr, nullptr, pack<2>, pack<3>, pack<4>, pack<5>, pack<6>, pack<7>};
constexpr Pack kUnpack[] = {nullptr,   nullptr,   unpack<2>, unpack<3>,
                            unpack<4>, unpack<5>, unpack<6>, unpack<7>};

}  // namespace
}  // namespace qsdp::QSDP_ISA
