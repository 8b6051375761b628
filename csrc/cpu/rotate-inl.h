// Blocks of gradients to their signed Hadamard transforms, in place; see [Note: Rotation] in
// qsdp/ops/reference/rotation.py.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/half.h"
#include "common/rotation.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

// By value of a block: the bit that changes its sign, or none.
alignas(64) constexpr auto kSigns = [] {
    std::array<uint32_t, kMostBlock> signs{};
    for (uint32_t i = 0; i < kMostBlock; ++i) signs[i] = is_negated(i) << 31;
    return signs;
}();

// The sums and differences within a vector.
QSDP_INLINE F within(F x) {
    x = sum_and_difference<4>(sum_and_difference<2>(sum_and_difference<1>(x)));
    if constexpr (kLanes > 8) x = sum_and_difference<8>(x);
    return x;
}

// A block of whole vectors.
template <class T, int Size>
void rotate_block(uint8_t* block) {
    constexpr int kVectors = Size / kLanes, kBytes = kLanes * sizeof(T);
    F x[kVectors];
    for (int i = 0; i < kVectors; ++i) {
        x[i] = within(flip(load(block + i * kBytes, T{}), &kSigns[i * kLanes]));
    }
    for (int h = 1; h < kVectors; h *= 2) {
        for (int first = 0; first < kVectors; first += 2 * h) {
            for (int i = first; i < first + h; ++i) {
                const F a = x[i], b = x[i + h];
                x[i] = add(a, b);
                x[i + h] = sub(a, b);
            }
        }
    }
    const F scale = splat(block_scale(Size));
    for (int i = 0; i < kVectors; ++i) {
        const F scaled = flip(mul(x[i], scale), &kSigns[i * kLanes]);
        store(block + i * kBytes, canonical(scaled), T{});
    }
}

// A block of fewer values than a vector has.
template <class T>
void rotate_few(uint8_t* block, int size) {
    float x[kLanes];
    for (int i = 0; i < size; ++i) {
        T item;
        memcpy(&item, block + i * sizeof(T), sizeof item);
        x[i] = bits_float(float_bits(widen(item)) ^ kSigns[i]);
    }
    for (int h = 1; h < size; h *= 2) {
        for (int i = 0; i < size; ++i) {
            if (i & h) continue;
            const float a = x[i], b = x[i + h];
            x[i] = a + b;
            x[i + h] = a - b;
        }
    }
    const float scale = block_scale(size);
    for (int i = 0; i < size; ++i) {
        T item;
        narrow(qsdp::canonical(bits_float(float_bits(x[i] * scale) ^ kSigns[i])), item);
        memcpy(block + i * sizeof(T), &item, sizeof item);
    }
}

// A block of ``size`` values, a power of two of at most Size.
template <class T, int Size>
void rotate_sized(uint8_t* block, int size) {
    if (size == Size) return rotate_block<T, Size>(block);
    if constexpr (Size / 2 >= kLanes) return rotate_sized<T, Size / 2>(block, size);
    rotate_few<T>(block, size);
}

template <class T>
void rotate_bucket(uint8_t* bucket, int64_t count) {
    for (; count >= kMostBlock; count -= kMostBlock, bucket += kMostBlock * sizeof(T)) {
        rotate_block<T, kMostBlock>(bucket);
    }
    for (int size = kMostBlock / 2; size > 0; size /= 2) {
        if ((count & size) == 0) continue;
        rotate_sized<T, kMostBlock / 2>(bucket, size);
        bucket += static_cast<size_t>(size) * sizeof(T);
    }
}

// The values [begin, end) of all stretches laid end to end, where a bucket belongs to the range
// that its first value lies in.
void rotate(const RotatedStretch* stretches, int64_t num_stretches, uint8_t* buffer, int64_t begin,
            int64_t end) {
    int64_t start = 0;
    for (int64_t s = 0; s < num_stretches && start < end; ++s) {
        const RotatedStretch& stretch = stretches[s];
        const int64_t size = stretch.bucket, numel = stretch.numel;
        const int64_t from = begin > start ? begin - start : 0;
        const int64_t to = end - start < numel ? end - start : numel;
        const int64_t first = from / size + (from % size != 0);
        with_dtype(stretch.dtype, [&](auto type) {
            for (int64_t i = first * size; i < to; i += size) {
                const int64_t left = numel - i;
                rotate_bucket<decltype(type)>(buffer + stretch.byte + i * int64_t{sizeof type},
                                              left < size ? left : size);
            }
        });
        start += numel;
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
