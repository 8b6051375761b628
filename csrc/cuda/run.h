// Eight consecutive values, which a lane has in registers: from memory and back.
#pragma once

#include "common/half.h"
#include "cuda/jobs.h"
#include "cuda/memory.h"
#include "cuda/warp.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace qsdp {

struct Run {
    float x[kRun];
};

// The block of the numbers that a run's values draw, the first of them number ``index`` of its
// segment, on a grid of ``epoch``.
QSDP_INLINE uint64_t block_of(int64_t index, uint32_t epoch = 0) {
    return uint64_t{epoch} << 32 | static_cast<uint64_t>(index) / kRun;
}

QSDP_INLINE Run load_run(const uint8_t* from, float) {
    const Words first = load_as<Words>(from), second = load_as<Words>(from + sizeof(Words));
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {
        run.x[i] = bits_float(first.word[i]);
        run.x[4 + i] = bits_float(second.word[i]);
    }
    return run;
}

// Two halves in a word. GPUs convert by one instruction, to the same values but for NaN, which may
// be any here.
QSDP_INLINE void widen_pair(uint32_t word, float& low, float& high, Bf16) {
    low = bits_float(word << 16);
    high = bits_float(word & 0xFFFF0000u);
}
QSDP_INLINE void widen_pair(uint32_t word, float& low, float& high, Fp16) {
#if defined(__CUDA_ARCH__)
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    low = __low2float(pair);
    high = __high2float(pair);
#else
    low = widen(Fp16{static_cast<uint16_t>(word)});
    high = widen(Fp16{static_cast<uint16_t>(word >> 16)});
#endif
}

// Of numbers that are not NaN and do not overflow.
QSDP_INLINE uint32_t narrow_pair(float low, float high, Bf16) {
#if defined(__CUDA_ARCH__)
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
#else
    Bf16 first, second;
    narrow(low, first);
    narrow(high, second);
    return first.bits | uint32_t{second.bits} << 16;
#endif
}
QSDP_INLINE uint32_t narrow_pair(float low, float high, Fp16) {
#if defined(__CUDA_ARCH__)
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
#else
    Fp16 first, second;
    narrow(low, first);
    narrow(high, second);
    return first.bits | uint32_t{second.bits} << 16;
#endif
}

template <class Half>
QSDP_INLINE Run load_run(const uint8_t* from, Half) {
    const Words words = load_as<Words>(from);
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {
        widen_pair(words.word[i], run.x[2 * i], run.x[2 * i + 1], Half{});
    }
    return run;
}

// ``count`` values at any address, the first of them in place of those past the end.
template <class T>
QSDP_INLINE Run load_some(const uint8_t* from, int count, T) {
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        run.x[i] = widen(load_item<T>(from + (i < count ? i : 0) * sizeof(T)));
    }
    return run;
}

// All lanes store their runs, one after another: whole sectors of 32 bytes, for which lanes
// exchange halves.
QSDP_INLINE void store_run(uint8_t* to, const Run& run, int lane, float) {
#if defined(__CUDA_ARCH__)
    const bool odd = lane % 2;
    float other[4];
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {
        other[i] = __shfl_xor_sync(0xFFFFFFFFu, odd ? run.x[i] : run.x[4 + i], 1);
    }
    Words first, second;
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {
        first.word[i] = float_bits(odd ? other[i] : run.x[i]);
        second.word[i] = float_bits(odd ? run.x[4 + i] : other[i]);
    }
    store_as(odd ? to - 16 : to, first);
    store_as(odd ? to + 16 : to + 32, second);
#else
    (void)lane;
    Words words[2];
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) words[i / 4].word[i % 4] = float_bits(run.x[i]);
    store_as(to, words[0]);
    store_as(to + sizeof(Words), words[1]);
#endif
}

// Of numbers that are not NaN and do not overflow.
template <class Half>
QSDP_INLINE void store_run(uint8_t* to, const Run& run, int, Half) {
    Words words;
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {
        words.word[i] = narrow_pair(run.x[2 * i], run.x[2 * i + 1], Half{});
    }
    store_as(to, words);
}

template <class T>
QSDP_INLINE void store_some(uint8_t* to, const Run& run, int count, T) {
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {  // a bound known beforehand keeps the run in registers
        T item;
        narrow(run.x[i], item);
        if (i < count) store_item(to + i * sizeof(T), item);
    }
}

// a + b with the NaN that x86 gives, where GPUs know one alone.
QSDP_INLINE float add_exactly(float a, float b) {
    const float sum = a + b;
    if (sum == sum) return sum;
    if (a != a) return bits_float(float_bits(a) | 0x400000u);
    if (b != b) return bits_float(float_bits(b) | 0x400000u);
    return bits_float(0xFFC00000u);
}

}  // namespace qsdp
