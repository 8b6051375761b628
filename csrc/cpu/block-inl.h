// A block, four vectors of values: from memory, and the last values of a bucket as one.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/portable.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

template <class T>
QSDP_INLINE void load_block(const uint8_t* from, F (&x)[4]) {
    for (int v = 0; v < 4; ++v) x[v] = load(from + v * kLanes * sizeof(T), T{});
}

// The last ``count`` items of a bucket, followed by copies of the first of them.
template <class T>
struct Tail {
    uint8_t bytes[kBlock * sizeof(T)];

    Tail(const uint8_t* from, int64_t count) {
        memcpy(bytes, from, count * sizeof(T));
        for (int64_t i = count; i < kBlock; ++i) memcpy(bytes + i * sizeof(T), from, sizeof(T));
    }
};

}  // namespace
}  // namespace qsdp::QSDP_ISA
