// A warp in one text for the GPU and for a test on the host: on the GPU a lane's part of a value is
// its own variable, on the host all 32 lie in an array and a step is a loop over them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"

namespace qsdp {

constexpr int kWarp = 32;

template <class V>
struct PerLane {
#if defined(__CUDA_ARCH__)
    V own;
    QSDP_MEMBER V& operator[](int) { return own; }
#else
    V all[kWarp];
    QSDP_MEMBER V& operator[](int lane) { return all[lane]; }
#endif
};

// Calls ``body`` with the number of each lane; lanes may not depend on one another within it.
template <class Body>
QSDP_INLINE void each_lane(const Body& body) {
#if defined(__CUDA_ARCH__)
    body(static_cast<int>(threadIdx.x % kWarp));
#else
    for (int lane = 0; lane < kWarp; ++lane) body(lane);
#endif
}

#if defined(__CUDA_ARCH__)
// Calls ``shuffle`` with each 32-bit word of a value.
template <class V, class Shuffle>
QSDP_INLINE V each_word(V value, const Shuffle& shuffle) {
    uint32_t words[sizeof(V) / 4];
    memcpy(words, &value, sizeof words);
    QSDP_UNROLL(8)
    for (uint32_t& word : words) word = shuffle(word);
    memcpy(&value, words, sizeof words);
    return value;
}

// The value of the lane whose number differs by the bit ``offset``.
template <class V>
QSDP_INLINE V across(V value, int offset) {
    return each_word(value,
                     [=](uint32_t word) { return __shfl_xor_sync(0xFFFFFFFFu, word, offset); });
}
#endif

// Gives each lane the value of the lane whose number differs by the bit ``offset``.
template <class V>
QSDP_INLINE void from_across(PerLane<V>& values, int offset, PerLane<V>& found) {
#if defined(__CUDA_ARCH__)
    found.own = across(values.own, offset);
#else
    for (int lane = 0; lane < kWarp; ++lane) found[lane] = values[lane ^ offset];
#endif
}

// Combines, by ``a.merge(b)``, the values of ``Width`` consecutive lanes into each of theirs. V is
// made of 32-bit words.
template <int Width, class V>
QSDP_INLINE void combine(PerLane<V>& values) {
#if defined(__CUDA_ARCH__)
    QSDP_UNROLL(8)
    for (int offset = Width / 2; offset > 0; offset /= 2) {
        values.own.merge(across(values.own, offset));
    }
#else
    for (int first = 0; first < kWarp; first += Width) {
        for (int lane = first + 1; lane < first + Width; ++lane) values[first].merge(values[lane]);
        for (int lane = first + 1; lane < first + Width; ++lane) values[lane] = values[first];
    }
#endif
}

// Of ``Width`` consecutive lanes, which hold a value of each of ``Groups``, the lanes that own a
// group: the first Width / Groups of them own the first.
template <int Width, int Groups>
struct Owners {
    static constexpr int kLanes = Width / Groups;
    static QSDP_MEMBER int group_of(int lane) { return lane % Width / kLanes; }
    static QSDP_MEMBER int first_of(int lane, int group) {
        return lane / Width * Width + group * kLanes;
    }
};

// As combine, of each group for its owners alone: with every step a lane gives away half of the
// groups that it still has.
template <int Width, int Groups, class V>
QSDP_INLINE void combine_groups(PerLane<V[Groups]>& values, PerLane<V>& combined) {
#if defined(__CUDA_ARCH__)
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    int offset = Width / 2;
    QSDP_UNROLL(8)
    for (int count = Groups / 2; count > 0; count /= 2, offset /= 2) {
        const bool is_upper = (lane & offset) != 0;
        QSDP_UNROLL(8)
        for (int i = 0; i < count; ++i) {
            const V low = values.own[i], high = values.own[count + i];
            values.own[i] = is_upper ? high : low;
            values.own[i].merge(across(is_upper ? low : high, offset));
        }
    }
    combined.own = values.own[0];
    QSDP_UNROLL(8)
    for (; offset > 0; offset /= 2) combined.own.merge(across(combined.own, offset));
#else
    using Own = Owners<Width, Groups>;
    for (int lane = 0; lane < kWarp; ++lane) {
        const int group = Own::group_of(lane), first = lane / Width * Width;
        combined[lane] = values[first][group];
        for (int i = 1; i < Width; ++i) combined[lane].merge(values[first + i][group]);
    }
#endif
}

// Gives every lane the value that the owners of ``group`` have.
template <int Width, int Groups, class V>
QSDP_INLINE void from_owners(PerLane<V>& values, int group, PerLane<V>& found) {
    using Own = Owners<Width, Groups>;
#if defined(__CUDA_ARCH__)
    found.own = values.own;
    if (Groups == 1) return;
    const int lane = Own::first_of(static_cast<int>(threadIdx.x % kWarp), group);
    found.own =
        each_word(values.own, [=](uint32_t word) { return __shfl_sync(0xFFFFFFFFu, word, lane); });
#else
    for (int lane = 0; lane < kWarp; ++lane) found[lane] = values[Own::first_of(lane, group)];
#endif
}

// What a lane has stored, all lanes see from here on.
QSDP_INLINE void settle() {
#if defined(__CUDA_ARCH__)
    __syncwarp();
#endif
}

// Whether ``test`` holds for the value of any lane.
template <class V, class Test>
QSDP_INLINE bool any(PerLane<V>& values, const Test& test) {
#if defined(__CUDA_ARCH__)
    return __any_sync(0xFFFFFFFFu, test(values.own));
#else
    bool found = false;
    for (int lane = 0; lane < kWarp; ++lane) found |= test(values[lane]);
    return found;
#endif
}

// Replaces each lane's number by the sum of those of the lanes before it; returns the sum of all.
QSDP_INLINE int64_t sum_before(PerLane<int64_t>& values) {
#if defined(__CUDA_ARCH__)
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const long long own = values.own;
    long long sum = own;
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const long long other = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
        if (lane >= offset) sum += other;
    }
    values.own = sum - own;
    return __shfl_sync(0xFFFFFFFFu, sum, kWarp - 1);
#else
    int64_t sum = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
        const int64_t own = values[lane];
        values[lane] = sum;
        sum += own;
    }
    return sum;
#endif
}

QSDP_INLINE int num_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return __popc(word);
#else
    return __builtin_popcount(word);
#endif
}

}  // namespace qsdp
