// The types of values in buffers and on the wire.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/portable.h"

namespace qsdp {

enum DType : int64_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kOpaque = 3 };

QSDP_INLINE int64_t item_bytes(int64_t dtype) {
    return dtype == kFp32 ? 4 : dtype == kOpaque ? 1 : 2;
}

// Calls ``work``, on the host, with a value of the type that ``dtype`` names, which is not opaque.
template <class Work>
static inline void with_dtype(int64_t dtype, const Work& work) {
    if (dtype == kFp32) return work(float{});
    if (dtype == kBf16) return work(Bf16{});
    work(Fp16{});
}

// The greatest finite value.
QSDP_INLINE constexpr float largest(float) {
    return 0x1.fffffep127f;
}
QSDP_INLINE constexpr float largest(Bf16) {
    return 0x1.fep127f;
}
QSDP_INLINE constexpr float largest(Fp16) {
    return 65504.0f;
}

}  // namespace qsdp
