// Roundings and their properties: the table of qsdp/common/rounding.py again. What a rounding does
// to a value stands in cpu/rounding-inl.h and in cuda/rounding.h.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace qsdp {

enum Rounding : int64_t {
    kShift = 0,
    kDither = 1,
    kStochastic = 2,
    kNearest = 3,
    kNumRoundings,
};

// How many numbers are drawn, r of [Note: Grid] in qsdp/ops/reference/codec.py.
enum class Drawn { kNothing, kABucket, kAValue };

struct RoundingProperties {
    Drawn drawn;
    bool is_taken_back = false;  // the receiver adds r to the code
    bool rounds_down = false;    // t + (r + 1/2) is rounded down; else t - r to the nearest
    bool has_levels = false;     // it serves learned levels too
    bool keeps_grids = false;    // it serves grids that are kept for many steps
};

QSDP_INLINE constexpr RoundingProperties properties_of(int64_t rounding) {
    switch (rounding) {
        case kDither:
            return {.drawn = Drawn::kAValue, .is_taken_back = true, .keeps_grids = true};
        case kStochastic:
            return {.drawn = Drawn::kAValue, .rounds_down = true, .has_levels = true};
        case kNearest:
            return {.drawn = Drawn::kNothing, .has_levels = true, .keeps_grids = true};
        default:
            return {.drawn = Drawn::kABucket, .is_taken_back = true};
    }
}

QSDP_INLINE constexpr bool draws_for_values(int64_t rounding) {
    return properties_of(rounding).drawn == Drawn::kAValue;
}

QSDP_INLINE constexpr bool rounds_down(int64_t rounding) {
    return properties_of(rounding).rounds_down;
}

// Whether a bucket's values are encoded with a number that they share.
QSDP_INLINE constexpr bool shifts_buckets(int64_t rounding) {
    return properties_of(rounding).drawn == Drawn::kABucket;
}

// And whether they are decoded with it.
QSDP_INLINE constexpr bool shifts_buckets_back(int64_t rounding) {
    return shifts_buckets(rounding) && properties_of(rounding).is_taken_back;
}

// Whether values are decoded with numbers of their own.
QSDP_INLINE constexpr bool takes_back_values(int64_t rounding) {
    return draws_for_values(rounding) && properties_of(rounding).is_taken_back;
}

// Whether learned levels are chosen by numbers.
QSDP_INLINE constexpr bool draws_for_levels(int64_t rounding) {
    return draws_for_values(rounding) && properties_of(rounding).has_levels;
}

// Whether it serves grids that are kept.
QSDP_INLINE constexpr bool keeps_grids(int64_t rounding) {
    return properties_of(rounding).keeps_grids;
}

// Whether a rounding that is known at run time alone is ``one``, such as one that rounds_down: a
// comparison for each such rounding, where the table would be a branch for every one.
template <bool (*one)(int64_t), int64_t first = 0, class Integer>
QSDP_INLINE constexpr bool is_one(Integer rounding) {
    if constexpr (first == kNumRoundings) {
        return false;
    } else if constexpr (one(first)) {
        return rounding == first || is_one<one, first + 1>(rounding);
    } else {
        return is_one<one, first + 1>(rounding);
    }
}

// Kernels are compiled for a rounding. This one's, which takes its shift as an argument, serves
// roundings that need no more of a kernel.
constexpr Rounding kOfBuckets = kShift;

// Whose kernel makes codes: to the nearest is by a shift of 0.
QSDP_INLINE constexpr Rounding encoder_of(int64_t rounding) {
    return rounding == kNearest ? kOfBuckets : static_cast<Rounding>(rounding);
}

// Whose makes codes of learned levels: the values' own numbers are all that matters.
QSDP_INLINE constexpr Rounding level_encoder_of(int64_t rounding) {
    return draws_for_levels(rounding) ? static_cast<Rounding>(rounding) : kOfBuckets;
}

// Whose makes values: what is not taken back does not matter.
QSDP_INLINE constexpr Rounding decoder_of(int64_t rounding) {
    return takes_back_values(rounding) ? static_cast<Rounding>(rounding) : kOfBuckets;
}

template <Rounding how>
struct KernelOf {
    static constexpr Rounding value = how;
};

// ``run(KernelOf<how>{})``, where ``how`` is ``kernel_of(chosen)``: itself or kOfBuckets. A switch,
// because nvcc joins what chained ifs lead to, and the joint kernel has too few registers.
template <Rounding (*kernel_of)(int64_t), class Integer, class Run>
QSDP_INLINE auto with_kernel(Integer chosen, const Run& run) {
    switch (chosen) {
        case kDither:
            if constexpr (kernel_of(kDither) == kDither) {
                return run(KernelOf<kDither>{});
            }
            break;
        case kStochastic:
            if constexpr (kernel_of(kStochastic) == kStochastic) {
                return run(KernelOf<kStochastic>{});
            }
            break;
        default:
            break;
    }
    return run(KernelOf<kOfBuckets>{});
}

}  // namespace qsdp
