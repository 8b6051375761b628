// The keys of magnitudes; see qsdp/ops/reference/magnitude.py.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace qsdp {

// What magnitudes are read from; see qsdp/ops/reference/magnitude.py.
enum class KeyType { kFp32, kBf16, kFp16, kInt64 };

constexpr int64_t kDigitBits = 11, kNumBins = 1 << kDigitBits;

QSDP_INLINE int32_t key_of(float value) {
    return static_cast<int32_t>(float_bits(value) & 0x7FFFFFFFu);
}
QSDP_INLINE int32_t key_of(Bf16 value) {
    return key_of(widen(value));
}
QSDP_INLINE int32_t key_of(Fp16 value) {
    const uint32_t nan = 0x7FC00000u | (value.bits & 0x3FFu) << 13;
    return (value.bits & 0x7FFFu) > 0x7C00u ? static_cast<int32_t>(nan) : key_of(widen(value));
}
QSDP_INLINE int64_t key_of(int64_t value) {
    return value;
}

// Calls ``work``, on the host, with the values as what ``type`` says they are.
template <class Work>
static void with_type(KeyType type, const void* values, const Work& work) {
    switch (type) {
        case KeyType::kFp32:
            return work(static_cast<const float*>(values));
        case KeyType::kBf16:
            return work(static_cast<const Bf16*>(values));
        case KeyType::kFp16:
            return work(static_cast<const Fp16*>(values));
        case KeyType::kInt64:
            return work(static_cast<const int64_t*>(values));
    }
}

}  // namespace qsdp
