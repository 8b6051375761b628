// How values are rounded to codes; see [Note: Keys] in qsdp/codec/rounding.py. What a rounding does
// to a value stands in cpu/rounding-inl.h and in cuda/rounding.h.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace qsdp {

enum Rounding : int64_t { kShift = 0, kDither = 1, kStochastic = 2, kNearest = 3 };

// What a value's rounding draws. kUniform: nothing of its own, for its bucket has a shift, or none.
enum class Noise { kUniform, kDither, kStochastic };

QSDP_INLINE Noise noise_of(int64_t rounding) {
    if (rounding == kDither) return Noise::kDither;
    return rounding == kStochastic ? Noise::kStochastic : Noise::kUniform;
}

}  // namespace qsdp
