// Loads and stores of a lane. Addresses are multiples of the size where the name says nothing else,
// which the host checks.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/portable.h"

namespace qsdp {

struct alignas(16) Words {
    uint32_t word[4];
};

QSDP_INLINE bool is_aligned(const void* address, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

template <class V>
QSDP_INLINE V load_as(const uint8_t* from) {
#if defined(__CUDA_ARCH__)
    return *reinterpret_cast<const V*>(from);
#else
    V value;
    if (!is_aligned(from, sizeof(V))) __builtin_trap();
    memcpy(&value, from, sizeof value);
    return value;
#endif
}

template <class V>
QSDP_INLINE void store_as(uint8_t* to, V value) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<V*>(to) = value;
#else
    if (!is_aligned(to, sizeof(V))) __builtin_trap();
    memcpy(to, &value, sizeof value);
#endif
}

// The same at any address.
template <class V>
QSDP_INLINE V load_item(const uint8_t* from) {
    if (is_aligned(from, sizeof(V))) return load_as<V>(from);
    uint8_t bytes[sizeof(V)];
    QSDP_UNROLL(8)
    for (int i = 0; i < static_cast<int>(sizeof(V)); ++i) bytes[i] = from[i];
    V value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

template <class V>
QSDP_INLINE void store_item(uint8_t* to, V value) {
    if (is_aligned(to, sizeof(V))) return store_as(to, value);
    uint8_t bytes[sizeof(V)];
    memcpy(bytes, &value, sizeof value);
    QSDP_UNROLL(8)
    for (int i = 0; i < static_cast<int>(sizeof(V)); ++i) to[i] = bytes[i];
}

// The low ``bytes`` bytes of a stream of up to 64 bits.
QSDP_INLINE void store_stream(uint8_t* to, uint64_t stream, int bytes) {
    if (bytes == 8 && is_aligned(to, 8)) return store_as(to, stream);
    if (bytes == 4 && is_aligned(to, 4)) return store_as(to, static_cast<uint32_t>(stream));
    if (bytes == 2 && is_aligned(to, 2)) return store_as(to, static_cast<uint16_t>(stream));
    for (int i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(stream >> 8 * i);
}

QSDP_INLINE uint64_t load_stream(const uint8_t* from, int bytes) {
    if (bytes == 8 && is_aligned(from, 8)) return load_as<uint64_t>(from);
    if (bytes == 4 && is_aligned(from, 4)) return load_as<uint32_t>(from);
    if (bytes == 2 && is_aligned(from, 2)) return load_as<uint16_t>(from);
    uint64_t stream = 0;
    for (int i = 0; i < bytes; ++i) stream |= uint64_t{from[i]} << 8 * i;
    return stream;
}

}  // namespace qsdp
