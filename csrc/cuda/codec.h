// What a warp does with a unit of an item: see [Note: Grid] and [Note: Payload] of qsdp/codec,
// which this follows operation by operation. Included by codec.cu, and by a test that runs it on
// the host.
#pragma once

#include "grid.h"
#include "half.h"
#include "items.h"
#include "philox.h"
#include "warp.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace qsdp {

// ---- runs: eight consecutive values of a lane ---------------------------------------------------

struct Run {
    float x[kRun];
};

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

// ---- buckets ------------------------------------------------------------------------------------

// Least and greatest value, and whether there is a zero, or a value that is not finite.
struct Extent {
    static constexpr uint32_t kZero = 1, kBroken = 2;
    float low, high;
    uint32_t flags;

    QSDP_MEMBER void merge(const Extent& other) {
        low = fminf(other.low, low);
        high = fmaxf(other.high, high);
        flags |= other.flags;
    }
    QSDP_MEMBER bool has_zero() const { return (flags & kZero) != 0; }
    QSDP_MEMBER bool is_broken() const { return (flags & kBroken) != 0; }
};

QSDP_INLINE Extent nothing() {
    return {bits_float(0x7F800000u), bits_float(0xFF800000u), 0u};
}

// ``SkipZeros`` leaves zeros out of low and high; without it they are wrong if there are zeros.
template <bool SkipZeros>
QSDP_INLINE void measure(const Run& run, Extent& extent) {
    float products = 0.0f;  // with zero: NaN where a value is not finite
    bool has_zero = false;
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const float x = run.x[i];
        const bool is_zero = x == 0.0f;
        has_zero |= is_zero;
        products = fmaf(x, 0.0f, products);
        if (SkipZeros && is_zero) continue;
        extent.low = fminf(x, extent.low);
        extent.high = fmaxf(x, extent.high);
    }
    extent.flags |= (has_zero ? Extent::kZero : 0u) | (products != products ? Extent::kBroken : 0u);
}

// What the values of a bucket have in common on either side.
struct Coder {
    Grid grid;
    WorkingGrid working;
    float r;  // the bucket's shift
    bool has_zero, is_broken;
    Stream stream;
    const float* levels;  // of a bucket that learned levels serve, or null
    int bits;
    Rounding rounding;
};

QSDP_INLINE Coder make_coder(const Item& item, uint64_t key, const float* levels, Grid grid,
                             bool has_zero, bool is_broken, float shift) {
    Coder coder;
    coder.grid = grid;
    coder.working = working_grid(grid);
    coder.r = shift;
    coder.has_zero = has_zero;
    coder.is_broken = is_broken;
    coder.stream = {key, item.parameter, item.group};
    coder.levels = item.levels >= 0 && has_learned_levels(grid) ? levels + item.levels : nullptr;
    coder.bits = item.bits;
    coder.rounding = static_cast<Rounding>(item.rounding);
    return coder;
}

// Half word ``index`` % 8, chosen: an index into registers would put them into memory.
QSDP_INLINE uint32_t half_of(const PhiloxBlock& block, uint32_t index) {
    const uint32_t low = index & 2 ? block.word[1] : block.word[0];
    const uint32_t high = index & 2 ? block.word[3] : block.word[2];
    return (index & 4 ? high : low) >> (index & 1) * 16 & 0xFFFFu;
}

// The shift of ``bucket``, from the block of eight buckets that ``block`` holds.
struct Shifts {
    int64_t number;
    PhiloxBlock block;

    QSDP_MEMBER float at(const Item& item, uint64_t key, int64_t bucket) {
        if (item.rounding != kShift) return 0.0f;
        if (bucket / kRun != number) {
            number = bucket / kRun;
            block = philox({key, item.parameter, item.group}, static_cast<uint64_t>(number));
        }
        return centred(half_of(block, static_cast<uint32_t>(bucket)));
    }
};

QSDP_INLINE uint32_t level_code(const Coder& coder, float t, float u) {
    const int last = (1 << coder.bits) - 1;
    int index = 0;
    for (int step = (last + 1) / 2; step > 0; step /= 2) {
        if (coder.levels[index + step] <= t) index += step;
    }
    const float below = coder.levels[index];
    const float above = coder.levels[index < last ? index + 1 : last];
    const float least = coder.rounding == kStochastic ? u * (above - below) : above - t;
    if (least < t - below) ++index;
    return static_cast<uint32_t>(index < last ? index : last);
}

// The codes of a run whose first value is number ``index`` of its segment, as a stream of bits.
QSDP_INLINE uint64_t encode_run(const Run& run, const Coder& coder, float inverse, int64_t index) {
    if (coder.is_broken) return 0;
    const bool has_own = coder.rounding == kDither || coder.rounding == kStochastic;
    PhiloxBlock own{};
    if (has_own) own = philox(coder.stream, static_cast<uint64_t>(index) / kRun);
    const uint32_t last = (1u << coder.bits) - 1;
    const float steps = static_cast<float>(last - coder.has_zero);
    uint32_t codes[kRun];
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const float x = run.x[i];
        float t = (x * coder.working.factor - coder.working.low) * inverse;
        const float r = has_own ? centred(half_word(own, static_cast<uint64_t>(i))) : coder.r;
        if (coder.levels != nullptr) {
            codes[i] = level_code(coder, t, r + 0.5f);
            continue;
        }
        // Rounding is monotone and keeps whole numbers, so saturating first is the same.
        t = coder.rounding == kStochastic ? t + (r + 0.5f) : t - r;
        t = fminf(fmaxf(t, 0.0f), steps);
        codes[i] = coder.rounding == kStochastic ? static_cast<uint32_t>(t)
                                                 : float_bits(t + 0x1.8p23f) & 0xFFu;
        if (coder.has_zero && x == 0.0f) codes[i] = last;
    }
    const uint32_t base = 1u << coder.bits;
    uint32_t half[2];
    QSDP_UNROLL(8)
    for (int h = 0; h < 2; ++h) {
        const uint32_t* four = codes + 4 * h;
        half[h] = ((four[3] * base + four[2]) * base + four[1]) * base + four[0];
    }
    return half[0] | uint64_t{half[1]} << 4 * coder.bits;
}

QSDP_INLINE float inverse_of(const Coder& coder) {
    if (coder.levels == nullptr) return inverse_step(coder.working);
    return 1.0f / (coder.working.step * static_cast<float>((1 << coder.bits) - 1));
}

QSDP_INLINE float largest(float) {
    return 0x1.fffffep127f;
}
QSDP_INLINE float largest(Bf16) {
    return 0x1.fep127f;
}
QSDP_INLINE float largest(Fp16) {
    return 65504.0f;
}

template <class T>
QSDP_INLINE Run decode_run(uint64_t stream, const Coder& coder, int64_t index, T) {
    PhiloxBlock own{};
    if (coder.rounding == kDither) own = philox(coder.stream, static_cast<uint64_t>(index) / kRun);
    const uint32_t last = (1u << coder.bits) - 1;
    const uint32_t half[2] = {static_cast<uint32_t>(stream),
                              static_cast<uint32_t>(stream >> 4 * coder.bits)};
    const float width = coder.working.step * static_cast<float>(last);
    const float unscale = 1.0f / coder.working.factor, limit = largest(T{});
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const uint32_t code = half[i / 4] >> i % 4 * coder.bits & last;
        float value;
        if (coder.levels != nullptr) {
            value = coder.grid.low + coder.levels[code] * width;
        } else {
            const float r = coder.rounding == kDither
                                ? centred(half_word(own, static_cast<uint64_t>(i)))
                                : coder.r;
            value =
                (coder.working.low + (static_cast<float>(code) + r) * coder.working.step) * unscale;
            if (coder.has_zero && code == last) value = 0.0f;
        }
        // NaN stays, as the one that all kernels give.
        value = value > limit ? limit : value;
        value = value < -limit ? -limit : value;
        run.x[i] = value == value ? value : bits_float(0x7FC00000u);
    }
    return run;
}

// ---- plain buckets: neither huge, nor broken, nor served by learned levels ----------------------

enum class Noise { kUniform, kDither, kStochastic };

struct Plain {
    float low, step, inverse, r;
    float steps;      // codes but those of zero, less one
    float zero_code;  // what no code is where there are no zeros
    uint32_t last;
    int bits;
};

QSDP_INLINE bool is_negative(float x) {
    return float_bits(x) >> 31 != 0;
}

// ``step`` is needed to decode, ``inverse`` to encode.
QSDP_INLINE Plain make_plain(float low, float step, float inverse, float r, bool has_zero,
                             int bits) {
    Plain plain;
    plain.low = low;
    plain.step = step;
    plain.inverse = inverse;
    plain.r = r;
    plain.last = (1u << bits) - 1;
    plain.steps = static_cast<float>(plain.last - has_zero);
    plain.zero_code = has_zero ? static_cast<float>(plain.last) : -1.0f;
    plain.bits = bits;
    return plain;
}

// Not so for NaN either.
QSDP_INLINE bool is_plain(Grid grid) {
    return fabsf(grid.low) <= 0x1p120f && fabsf(grid.scale) <= 0x1p112f;
}

// The shift of value number i of a block, or what is added before the floor.
template <Noise noise>
QSDP_INLINE float draw(const PhiloxBlock& block, int i) {
    const float own = bits_float(0x43000000u | half_word(block, static_cast<uint64_t>(i)));
    return (own - (noise == Noise::kDither ? 128.5f : 128.0f)) + 0x1p-17f;
}

QSDP_INLINE float add_down(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rd(a, b);
#else
    return floorf(a) + b;  // b is a multiple of the sum's ulp, 1
#endif
}

// As encode_run. Values but zeros are at least the low, so nothing is below code 0.
template <Noise noise, bool Zeros>
QSDP_INLINE uint64_t encode_plain(const Run& run, const Plain& plain, Stream stream,
                                  int64_t index) {
    constexpr float kWhole = 0x1.8p23f;  // leaves a whole number in the low bits
    constexpr uint32_t kWholeBits = 0x4B400000u;
    PhiloxBlock own{};
    if (noise != Noise::kUniform) own = philox(stream, static_cast<uint64_t>(index) / kRun);
    uint32_t raw[kRun];
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        float t = (run.x[i] - plain.low) * plain.inverse;
        if (noise == Noise::kUniform) t -= plain.r;
        if (noise == Noise::kDither) t -= draw<noise>(own, i);
        if (noise == Noise::kStochastic) t += draw<noise>(own, i);
        t = fminf(t, plain.steps);
        raw[i] = float_bits(noise == Noise::kStochastic ? add_down(t, kWhole) : t + kWhole);
        if (Zeros && run.x[i] == 0.0f) raw[i] = kWholeBits + plain.last;
    }
    const uint32_t base = plain.last + 1;
    const uint32_t excess = kWholeBits * (((base + 1) * base + 1) * base + 1);
    uint32_t half[2];
    QSDP_UNROLL(8)
    for (int h = 0; h < 2; ++h) {
        const uint32_t* four = raw + 4 * h;
        half[h] = ((four[3] * base + four[2]) * base + four[1]) * base + four[0] - excess;
    }
    return half[0] | uint64_t{half[1]} << 4 * plain.bits;
}

// As decode_run.
template <bool Dither, bool Zeros, class T>
QSDP_INLINE Run decode_plain(uint64_t codes, const Plain& plain, Stream stream, int64_t index, T) {
    PhiloxBlock own{};
    if (Dither) own = philox(stream, static_cast<uint64_t>(index) / kRun);
    const uint32_t half[2] = {static_cast<uint32_t>(codes),
                              static_cast<uint32_t>(codes >> 4 * plain.bits)};
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const uint32_t bits = (half[i / 4] >> i % 4 * plain.bits & plain.last) | 0x4B000000u;
        const float code = bits_float(bits) - 0x1p23f;
        const float r = Dither ? draw<Noise::kDither>(own, i) : plain.r;
        float value = plain.low + (code + r) * plain.step;
        if (Zeros && code == plain.zero_code) value = 0.0f;
        if (sizeof(T) == 2) value = fmaxf(fminf(value, largest(T{})), -largest(T{}));
        run.x[i] = value;
    }
    return run;
}

// ---- units --------------------------------------------------------------------------------------

// What a warp works on.
struct Work {
    const Item* item;
    const float* levels;
    uint64_t key;
    const uint8_t* from;
    uint8_t* to;
    bool add;
};

QSDP_INLINE void store_grid(uint8_t* to, Grid grid) {
    store_item(to, float_bits(grid.low));
    store_item(to + 4, float_bits(grid.scale));
}

QSDP_INLINE Grid grid_of(const Extent& extent, int bits) {
    Grid grid = make_grid(extent.low, extent.high, extent.has_zero(), extent.is_broken(), bits);
    if (extent.is_broken()) grid.low = bits_float(0x7FC00000u);
    return grid;
}

// What of a bucket's grid its values are encoded by.
struct Scale {
    float low;
    float inverse;  // of the step; negative, -0 too, where there are zeros
    float r;
};

// The extents of groups of ``Together`` rows.
template <bool SkipZeros, int Together>
QSDP_INLINE void measure_groups(PerLane<Run[kRows]>& held,
                                PerLane<Extent[kRows / Together]>& extents) {
    each_lane([&](int lane) {
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            Extent& extent = extents[lane][row / Together];
            if (row % Together == 0) extent = nothing();
            measure<SkipZeros>(held[lane][row], extent);
        }
    });
}

// A whole unit of buckets of ``Bucket`` values, read once. Of each bucket some lanes, its owners,
// make the grid. Returns false, having done nothing, where a bucket is special.
template <class T, int Bucket, Noise noise>
QSDP_INLINE bool encode_whole_unit(const Work& work, int64_t unit) {
    constexpr int kTogether = Bucket < kRow ? 1 : Bucket / kRow;   // rows of a bucket
    constexpr int kWidth = Bucket < kRow ? Bucket / kRun : kWarp;  // lanes of a bucket
    constexpr int kBuckets = kUnit / Bucket, kGroups = kRows / kTogether;
    using Own = Owners<kWidth, kGroups>;
    const Item& item = *work.item;
    const int bits = item.bits;
    const Stream stream{work.key, item.parameter, item.group};
    const uint8_t* from = work.from + item.buffer_byte + unit * kUnit * sizeof(T);
    uint8_t* data = work.to + item.data_byte + unit * (kUnit / kRun) * bits;
    uint8_t* meta = work.to + item.meta_byte + unit * kBuckets * kMetaBytes;
    PerLane<Run[kRows]> held;
    each_lane([&](int lane) {
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            held[lane][row] = load_run(from + (row * kRow + lane * kRun) * sizeof(T), T{});
        }
    });
    PerLane<Extent[kGroups]> extents;
    PerLane<Extent> extent;
    measure_groups<false, kTogether>(held, extents);
    combine_groups<kWidth, kGroups>(extents, extent);
    const bool has_zeros = any(extent, [](const Extent& own) { return own.has_zero(); });
    if (has_zeros) {
        measure_groups<true, kTogether>(held, extents);
        combine_groups<kWidth, kGroups>(extents, extent);
    }
    PerLane<Grid> grid;
    each_lane([&](int lane) { grid[lane] = grid_of(extent[lane], bits); });
    if (any(grid, [](Grid own) { return !is_plain(own); })) return false;
    PerLane<Scale> scale;
    each_lane([&](int lane) {
        const Grid own = grid[lane];
        const int bucket = (Own::group_of(lane) * kTogether * kRow + lane * kRun) / Bucket;
        if (lane % Own::kLanes == 0) store_grid(meta + bucket * kMetaBytes, own);
        const float inverse = inverse_step({1.0f, own.low, fabsf(own.scale)});
        scale[lane] = {own.low, copysignf(inverse, own.scale), 0.0f};
        if (noise == Noise::kUniform && item.rounding == kShift) {
            // A unit's buckets share a block.
            const uint64_t number = static_cast<uint64_t>(unit * kBuckets);
            const uint32_t index = static_cast<uint32_t>(number) + static_cast<uint32_t>(bucket);
            scale[lane].r = centred(half_of(philox(stream, number / kRun), index));
        }
    });
    QSDP_UNROLL(8)
    for (int group = 0; group < kGroups; ++group) {
        PerLane<Scale> shared;
        from_owners<kWidth, kGroups>(scale, group, shared);
        each_lane([&](int lane) {
            const Scale own = shared[lane];
            const Plain plain = make_plain(own.low, 0.0f, fabsf(own.inverse), own.r,
                                           is_negative(own.inverse), bits);
            QSDP_UNROLL(8)
            for (int i = 0; i < kTogether; ++i) {
                const int row = group * kTogether + i, offset = row * kRow + lane * kRun;
                const Run& run = held[lane][row];
                const int64_t index = unit * kUnit + offset;
                store_stream(data + offset / kRun * bits,
                             has_zeros ? encode_plain<noise, true>(run, plain, stream, index)
                                       : encode_plain<noise, false>(run, plain, stream, index),
                             bits);
            }
        });
    }
    return true;
}

// One bucket of any size, at any address; read twice.
template <class T>
QSDP_INLINE void encode_bucket(const Work& work, int64_t bucket) {
    const Item& item = *work.item;
    const int bits = item.bits;
    const int64_t start = bucket * item.bucket;
    const int64_t left = item.numel - start, count = left < item.bucket ? left : item.bucket;
    const uint8_t* from = work.from + item.buffer_byte + start * sizeof(T);
    const auto load = [&](int64_t i) {
        const int64_t rest = count - i;
        return load_some(from + i * sizeof(T), rest < kRun ? static_cast<int>(rest) : kRun, T{});
    };
    PerLane<Extent> extent;
    each_lane([&](int lane) {
        extent[lane] = nothing();
        for (int64_t i = lane * kRun; i < count; i += kRow) measure<false>(load(i), extent[lane]);
    });
    combine<kWarp>(extent);
    if (any(extent, [](const Extent& e) { return e.has_zero(); })) {
        each_lane([&](int lane) {
            extent[lane] = nothing();
            for (int64_t i = lane * kRun; i < count; i += kRow) {
                measure<true>(load(i), extent[lane]);
            }
        });
        combine<kWarp>(extent);
    }
    each_lane([&](int lane) {
        Shifts shifts{-1, {}};
        const Extent own = extent[lane];
        const Grid grid = grid_of(own, bits);
        if (lane == 0) store_grid(work.to + item.meta_byte + bucket * kMetaBytes, grid);
        const Coder coder = make_coder(item, work.key, work.levels, grid, own.has_zero(),
                                       own.is_broken(), shifts.at(item, work.key, bucket));
        const float inverse = inverse_of(coder);
        for (int64_t i = lane * kRun; i < count; i += kRow) {
            const int64_t rest = count - i;
            const int valid = rest < kRun ? static_cast<int>(rest) : kRun;
            uint64_t stream = encode_run(load(i), coder, inverse, start + i);
            if (valid < kRun) stream &= (uint64_t{1} << valid * bits) - 1;
            store_stream(work.to + item.data_byte + (start + i) / kRun * bits, stream,
                         (valid * bits + 7) / 8);
        }
    });
}

template <class T, int Bucket>
QSDP_INLINE bool encode_whole_buckets(const Work& work, int64_t unit) {
    switch (work.item->rounding) {
        case kDither:
            return encode_whole_unit<T, Bucket, Noise::kDither>(work, unit);
        case kStochastic:
            return encode_whole_unit<T, Bucket, Noise::kStochastic>(work, unit);
        default:
            return encode_whole_unit<T, Bucket, Noise::kUniform>(work, unit);
    }
}

// Whether the unit is done: its buckets are of a size that kernels are made for, and plain.
template <class T>
QSDP_INLINE bool encode_whole(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const bool is_whole = (unit + 1) * kUnit <= item.numel && item.levels < 0 &&
                          is_aligned(work.from + item.buffer_byte, sizeof(Words));
    if (!is_whole) return false;
    switch (item.bucket) {
        case 128:
            return encode_whole_buckets<T, 128>(work, unit);
        case 256:
            return encode_whole_buckets<T, 256>(work, unit);
        case 1024:
            return encode_whole_buckets<T, 1024>(work, unit);
        default:
            return false;
    }
}

template <class T>
QSDP_INLINE void encode_coded(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    if (encode_whole<T>(work, unit)) return;
    const int64_t first = unit * item.per_unit, all = (item.numel + item.bucket - 1) / item.bucket;
    for (int64_t bucket = first; bucket < first + item.per_unit && bucket < all; ++bucket) {
        encode_bucket<T>(work, bucket);
    }
}

// A whole unit of buckets of 2**item.bucket_log2 <= 1024 values, none of them special.
template <class T, bool Add, bool Dither, bool Zeros>
QSDP_INLINE void decode_whole_rows(const Work& work, int64_t unit, int bucket_log2,
                                   PerLane<uint64_t[kRows]>& codes, PerLane<Grid[kRows]>& grid) {
    const Item& item = *work.item;
    const Stream stream{work.key, item.parameter, item.group};
    uint8_t* to = work.to + item.buffer_byte + unit * kUnit * sizeof(T);
    each_lane([&](int lane) {
        Shifts shifts{-1, {}};  // a unit's buckets share a block, or two
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            const int offset = row * kRow + lane * kRun;
            const int64_t index = unit * kUnit + offset;
            const float shift = shifts.at(item, work.key, index >> bucket_log2);
            const Grid own = grid[lane][row];
            const Plain plain = make_plain(own.low, fabsf(own.scale), 0.0f, shift,
                                           is_negative(own.scale), item.bits);
            Run run = decode_plain<Dither, Zeros>(codes[lane][row], plain, stream, index, T{});
            uint8_t* out = to + offset * sizeof(T);
            if (Add) {
                const Run there = load_run(out, T{});
                QSDP_UNROLL(8)
                for (int i = 0; i < kRun; ++i) run.x[i] = add_exactly(there.x[i], run.x[i]);
            }
            store_run(out, run, lane, T{});
        }
    });
}

// Returns false, having done nothing, where a bucket is special.
template <class T, bool Add>
QSDP_INLINE bool decode_whole(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const int bits = item.bits, bucket_log2 = item.bucket_log2;
    const uint8_t* from = work.from + item.data_byte + unit * (kUnit / kRun) * bits;
    PerLane<uint64_t[kRows]> codes;
    PerLane<Grid[kRows]> grid;
    each_lane([&](int lane) {  // many loads on their way at once
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            const int offset = row * kRow + lane * kRun;
            const int64_t bucket = (unit * kUnit + offset) >> bucket_log2;
            const uint8_t* meta = work.from + item.meta_byte + bucket * kMetaBytes;
            codes[lane][row] = load_stream(from + offset / kRun * bits, bits);
            grid[lane][row] = {load_item<float>(meta), load_item<float>(meta + 4)};
        }
    });
    const auto any_row = [&](const auto& test) {
        return any(grid, [&](const Grid(&rows)[kRows]) {
            bool found = false;
            QSDP_UNROLL(8)
            for (int row = 0; row < kRows; ++row) found |= test(rows[row]);
            return found;
        });
    };
    if (any_row([](Grid own) { return !is_plain(own); })) return false;
    const bool has_zeros = any_row([](Grid own) { return is_negative(own.scale); });
    if (item.rounding == kDither) {
        has_zeros ? decode_whole_rows<T, Add, true, true>(work, unit, bucket_log2, codes, grid)
                  : decode_whole_rows<T, Add, true, false>(work, unit, bucket_log2, codes, grid);
    } else {
        has_zeros ? decode_whole_rows<T, Add, false, true>(work, unit, bucket_log2, codes, grid)
                  : decode_whole_rows<T, Add, false, false>(work, unit, bucket_log2, codes, grid);
    }
    return true;
}

// A unit of buckets of any size and kind, at any address.
template <class T, bool Add>
QSDP_INLINE void decode_any(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const int bits = item.bits;
    const int64_t start = unit * item.unit_values, left = item.numel - start;
    const int64_t count = left < item.unit_values ? left : item.unit_values;
    each_lane([&](int lane) {
        Shifts shifts{-1, {}};
        QSDP_UNROLL(1)
        for (int64_t offset = lane * kRun; offset < count; offset += kRow) {
            const int64_t index = start + offset, rest = count - offset;
            const int64_t bucket = index / item.bucket;
            const int valid = rest < kRun ? static_cast<int>(rest) : kRun;
            const uint8_t* meta = work.from + item.meta_byte + bucket * kMetaBytes;
            const Grid grid{load_item<float>(meta), load_item<float>(meta + 4)};
            const Coder coder =
                make_coder(item, work.key, work.levels, grid, float_bits(grid.scale) >> 31, false,
                           shifts.at(item, work.key, bucket));
            const uint64_t codes = load_stream(work.from + item.data_byte + index / kRun * bits,
                                               (valid * bits + 7) / 8);
            Run run = decode_run(codes, coder, index, T{});
            uint8_t* out = work.to + item.buffer_byte + index * sizeof(T);
            if (Add) {
                const Run there = load_some(out, valid, T{});
                QSDP_UNROLL(8)
                for (int i = 0; i < kRun; ++i) run.x[i] = add_exactly(there.x[i], run.x[i]);
            }
            store_some(out, run, valid, T{});
        }
    });
}

template <class T, bool Add>
QSDP_INLINE void decode_coded(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const bool is_whole = (unit + 1) * kUnit <= item.numel && item.unit_values == kUnit &&
                          item.bucket_log2 >= 0 && item.levels < 0 &&
                          is_aligned(work.to + item.buffer_byte, sizeof(Words));
    if (!is_whole || !decode_whole<T, Add>(work, unit)) decode_any<T, Add>(work, unit);
}

// Values [first, last) of a raw item, converted; equal types are copied.
template <class From, class To, bool Add>
QSDP_INLINE void convert(const uint8_t* from, uint8_t* to, int64_t first, int64_t last) {
    each_lane([&](int lane) {
        QSDP_UNROLL(4)
        for (int64_t i = first + lane; i < last; i += kWarp) {
            const From own = load_item<From>(from + i * sizeof(From));
            To out;
            if constexpr (Add) {
                out = add_exactly(load_item<To>(to + i * sizeof(To)), widen(own));
            } else {
                narrow(widen(own), out);
            }
            store_item(to + i * sizeof(To), out);
        }
    });
}

// Bytes [first, last), both relative to ``from`` and ``to``; ``from`` null: zeros.
QSDP_INLINE void copy_bytes(const uint8_t* from, uint8_t* to, int64_t first, int64_t last) {
    const bool is_even =
        (from == nullptr || is_aligned(from + first, 16)) && is_aligned(to + first, 16);
    const int64_t whole = is_even ? (last - first) / 16 : 0;
    each_lane([&](int lane) {
        QSDP_UNROLL(4)
        for (int64_t i = lane; i < whole; i += kWarp) {
            const int64_t at = first + 16 * i;
            store_as(to + at, from == nullptr ? Words{} : load_as<Words>(from + at));
        }
        for (int64_t at = first + 16 * whole + lane; at < last; at += kWarp) {
            to[at] = from == nullptr ? uint8_t{0} : from[at];
        }
    });
}

// Values [first, last) of a raw item from one buffer's type to the other's.
QSDP_INLINE void copy_raw(int from_type, int to_type, const uint8_t* from, uint8_t* to,
                          int64_t first, int64_t last, bool add) {
    if (add) {
        if (from_type == kFp32) return convert<float, float, true>(from, to, first, last);
        if (from_type == kBf16) return convert<Bf16, float, true>(from, to, first, last);
        return convert<Fp16, float, true>(from, to, first, last);
    }
    if (from_type == to_type) {
        const int64_t item = item_bytes(to_type);
        return copy_bytes(from, to, first * item, last * item);
    }
    switch (3 * from_type + to_type) {
        case 3 * kFp32 + kBf16:
            return convert<float, Bf16, false>(from, to, first, last);
        case 3 * kFp32 + kFp16:
            return convert<float, Fp16, false>(from, to, first, last);
        case 3 * kBf16 + kFp32:
            return convert<Bf16, float, false>(from, to, first, last);
        case 3 * kBf16 + kFp16:
            return convert<Bf16, Fp16, false>(from, to, first, last);
        case 3 * kFp16 + kFp32:
            return convert<Fp16, float, false>(from, to, first, last);
        case 3 * kFp16 + kBf16:
            return convert<Fp16, Bf16, false>(from, to, first, last);
        default:
            break;
    }
}

// The part of an item that is no codes: raw values or zeros.
QSDP_INLINE void copy_unit(const Work& work, int64_t unit, bool is_encoding) {
    const Item& item = *work.item;
    const int64_t first = unit * item.unit_values, end = first + item.unit_values;
    const int64_t last = end < item.numel ? end : item.numel;
    if (item.kind == Kind::kZeros) {
        copy_bytes(nullptr, work.to + item.data_byte, first, last);
    } else if (is_encoding) {
        copy_raw(item.dtype, item.wire, work.from + item.buffer_byte, work.to + item.data_byte,
                 first, last, false);
    } else {
        copy_raw(item.wire, item.dtype, work.from + item.data_byte, work.to + item.buffer_byte,
                 first, last, work.add);
    }
}

QSDP_INLINE int item_of(const Job& job, int64_t unit) {
    int low = 0, high = job.num_items;  // items [low, high) may hold it
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (job.items[middle].first_unit <= unit ? low : high) = middle;
    }
    return low;
}

// Unit number ``unit`` of a job, by one warp.
template <bool Encode>
QSDP_INLINE void run_unit(const Job& job, int64_t unit) {
    if (Encode && unit == 0 && job.has_header) {
        each_lane([&](int lane) {
            const int words = kHeaderBytes / 8;
            if (lane < words) store_item(job.to + 8 * lane, job.header[lane]);
        });
    }
    if (unit >= job.num_units) return;
    const Item& item = job.items[item_of(job, unit)];
    const Work work{&item, job.levels, job.key, job.from, job.to, job.add};
    const int64_t own = unit - item.first_unit;
    if (item.kind != Kind::kCoded) {
        copy_unit(work, own, Encode);
    } else if constexpr (Encode) {
        if (item.dtype == kFp32) return encode_coded<float>(work, own);
        if (item.dtype == kBf16) return encode_coded<Bf16>(work, own);
        encode_coded<Fp16>(work, own);
    } else {
        if (item.dtype == kFp32 && work.add) return decode_coded<float, true>(work, own);
        if (item.dtype == kFp32) return decode_coded<float, false>(work, own);
        if (item.dtype == kBf16) return decode_coded<Bf16, false>(work, own);
        decode_coded<Fp16, false>(work, own);
    }
}

}  // namespace qsdp
