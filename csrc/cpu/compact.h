// Copying the values that a mask keeps, and back; see qsdp/ops/reference/sparse.py for the
// specification.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "common/span.h"

namespace qsdp {

// Returns false if ``strict`` and a value that is not kept has a bit set.
template <int kItem>
bool compact_span(const uint8_t* dense, const uint8_t* bitmap, int64_t numel, uint8_t* out,
                  bool strict) {
    bool is_clean = true;
    for (int64_t byte = 0; 8 * byte < numel; ++byte, dense += 8 * kItem) {
        uint32_t kept = mask_byte(bitmap, byte, numel);
        if (strict) {
            const int64_t left = numel - 8 * byte;
            uint32_t set = 0;
            for (int i = 0; i < (left < 8 ? static_cast<int>(left) : 8); ++i) {
                uint32_t value = 0;
                std::memcpy(&value, dense + i * kItem, kItem);
                set |= static_cast<uint32_t>(value != 0) << i;
            }
            is_clean &= (set & ~kept) == 0;
        }
        for (; kept != 0; kept &= kept - 1, out += kItem) {
            std::memcpy(out, dense + std::countr_zero(kept) * kItem, kItem);
        }
    }
    return is_clean;
}

template <int kItem>
void expand_span(const uint8_t* values, const uint8_t* bitmap, int64_t numel, uint8_t* dense) {
    std::memset(dense, 0, static_cast<size_t>(numel * kItem));
    for (int64_t byte = 0; 8 * byte < numel; ++byte, dense += 8 * kItem) {
        uint32_t kept = mask_byte(bitmap, byte, numel);
        for (; kept != 0; kept &= kept - 1, values += kItem) {
            std::memcpy(dense + std::countr_zero(kept) * kItem, values, kItem);
        }
    }
}

}  // namespace qsdp
