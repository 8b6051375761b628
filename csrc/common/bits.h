// Eight b-bit codes <-> b bytes, a little-endian bit stream.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace qsdp {

// ``codes`` holds one code a byte, each below 2**Bits; the result's low 8 * Bits bits are the
// stream.
template <int Bits>
QSDP_INLINE uint64_t pack_codes(uint64_t codes) {
    uint64_t stream = 0;
    for (int i = 0; i < 8; ++i) stream |= (codes >> 8 * i & 0xFF) << Bits * i;
    return stream;
}

template <int Bits>
QSDP_INLINE uint64_t unpack_codes(uint64_t stream) {
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) codes |= (stream >> Bits * i & ((1u << Bits) - 1)) << 8 * i;
    return codes;
}

}  // namespace qsdp
