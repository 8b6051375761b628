// Keys of magnitudes, counted and compared; see qsdp/ops/reference/magnitude.py for the
// specification. Plain loops, which the compiler makes vectors of.
#pragma once

#include <cstdint>

#include "common/magnitude.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

template <class T>
void count_digits_of(const T* values, int64_t count, int64_t prefix, int shift, int width,
                     int64_t* counts) {
    using Key = decltype(key_of(T{}));
    constexpr int kTables = 4, kSkip = 16;  // one table would wait for its own last addition
    constexpr int64_t kUncounted = kNumBins;
    const int high = shift + width;
    const Key mask = static_cast<Key>((Key{1} << width) - 1);
    // Keys have no bits from kKeyBits on, and a shift by more would be undefined.
    constexpr int kKeyBits = 8 * sizeof(Key) - 1;
    const bool takes_all = high >= kKeyBits;
    if (takes_all ? prefix != 0 : static_cast<Key>(prefix) != prefix) return;
    const Key wanted = static_cast<Key>(prefix);
    const auto matches = [=](T value) { return takes_all || (key_of(value) >> high) == wanted; };
    int64_t tables[kTables][kNumBins + 1] = {};
    for (int64_t begin = 0; begin < count; begin += kSkip) {
        const int64_t size = count - begin < kSkip ? count - begin : kSkip;
        if (!takes_all && size == kSkip) {
            bool any = false;
            for (int i = 0; i < kSkip; ++i) any |= matches(values[begin + i]);
            if (!any) continue;
        }
        for (int64_t i = 0; i < size; ++i) {
            const T value = values[begin + i];
            const int64_t digit = (shift < kKeyBits ? key_of(value) >> shift : 0) & mask;
            ++tables[i % kTables][matches(value) ? digit : kUncounted];
        }
    }
    for (int64_t bin = 0; bin < kNumBins; ++bin) {
        for (int t = 0; t < kTables; ++t) counts[bin] += tables[t][bin];
    }
}

template <class T>
void mark_above_of(const T* values, int64_t count, int64_t key, uint8_t* out) {
    using Key = decltype(key_of(T{}));
    const bool none = static_cast<Key>(key) != key;
    const Key above = static_cast<Key>(key);
    for (int64_t i = 0; i < count; ++i) out[i] = !none && key_of(values[i]) > above;
}

void count_digits(KeyType type, const void* values, int64_t begin, int64_t end, int64_t prefix,
                  int shift, int width, int64_t* counts) {
    with_type(type, values, [=](const auto* from) {
        count_digits_of(from + begin, end - begin, prefix, shift, width, counts);
    });
}

void mark_above(KeyType type, const void* values, int64_t begin, int64_t end, int64_t key,
                uint8_t* out) {
    with_type(type, values, [=](const auto* from) {
        mark_above_of(from + begin, end - begin, key, out + begin);
    });
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
