// What a warp does with a unit of an item: see [Note: Grid] and [Note: Payload] of qsdp/codec,
// which this follows operation by operation. Included by codec.cu, and by a test that runs it on
// the host.
#pragma once

#include "grid.h"
#include "half.h"
#include "items.h"
#include "philox.h"
#include "warp.h"

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

template <class Half>
QSDP_INLINE Run load_run(const uint8_t* from, Half) {
    const Words words = load_as<Words>(from);
    Run run;
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {
        run.x[2 * i] = widen(Half{static_cast<uint16_t>(words.word[i])});
        run.x[2 * i + 1] = widen(Half{static_cast<uint16_t>(words.word[i] >> 16)});
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

// All lanes store their runs, one after another, in whole sectors of 32 bytes: lanes exchange
// halves.
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

template <class Half>
QSDP_INLINE void store_run(uint8_t* to, const Run& run, int, Half) {
    Words words;
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {
        Half low, high;
        narrow(run.x[2 * i], low);
        narrow(run.x[2 * i + 1], high);
        words.word[i] = low.bits | uint32_t{high.bits} << 16;
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

// Least and greatest value, and least and greatest bits of a magnitude.
struct Extent {
    float low, high;
    uint32_t least, most;

    QSDP_MEMBER void merge(const Extent& other) {
        low = other.low < low ? other.low : low;
        high = other.high > high ? other.high : high;
        least = other.least < least ? other.least : least;
        most = other.most > most ? other.most : most;
    }
    QSDP_MEMBER bool has_zero() const { return least == 0; }
    QSDP_MEMBER bool is_broken() const { return most >= 0x7F800000u; }
};

QSDP_INLINE Extent nothing() {
    return {bits_float(0x7F800000u), bits_float(0xFF800000u), ~0u, 0u};
}

// ``SkipZeros`` leaves zeros out of low and high; without it they are wrong if there are zeros.
template <bool SkipZeros>
QSDP_INLINE void measure(const Run& run, Extent& extent) {
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const float x = run.x[i];
        const uint32_t magnitude = float_bits(x) & 0x7FFFFFFFu;
        extent.least = magnitude < extent.least ? magnitude : extent.least;
        extent.most = magnitude > extent.most ? magnitude : extent.most;
        if (SkipZeros && magnitude == 0) continue;
        extent.low = fminf(x, extent.low);
        extent.high = fmaxf(x, extent.high);
    }
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
        return centred(half_word(block, static_cast<uint64_t>(bucket)));
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

// A whole unit of buckets of ``Bucket`` values, read once.
template <class T, int Bucket>
QSDP_INLINE void encode_whole_unit(const Work& work, int64_t unit) {
    constexpr int kTogether = Bucket < kRow ? 1 : Bucket / kRow;   // rows of a bucket
    constexpr int kWidth = Bucket < kRow ? Bucket / kRun : kWarp;  // lanes of a bucket
    struct Held {
        Run row[kRows];
    };
    const Item& item = *work.item;
    const int bits = item.bits;
    const uint8_t* from = work.from + item.buffer_byte + unit * kUnit * sizeof(T);
    PerLane<Held> held;
    each_lane([&](int lane) {
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            held[lane].row[row] = load_run(from + (row * kRow + lane * kRun) * sizeof(T), T{});
        }
    });
    Shifts shifts{-1, {}};
    QSDP_UNROLL(8)
    for (int first = 0; first < kRows; first += kTogether) {
        PerLane<Extent> extent;
        each_lane([&](int lane) {
            extent[lane] = nothing();
            QSDP_UNROLL(8)
            for (int i = 0; i < kTogether; ++i) {
                measure<false>(held[lane].row[first + i], extent[lane]);
            }
        });
        combine<kWidth>(extent);
        if (any(extent, [](const Extent& e) { return e.has_zero(); })) {
            each_lane([&](int lane) {
                extent[lane] = nothing();
                QSDP_UNROLL(8)
                for (int i = 0; i < kTogether; ++i) {
                    measure<true>(held[lane].row[first + i], extent[lane]);
                }
            });
            combine<kWidth>(extent);
        }
        each_lane([&](int lane) {
            const int64_t index = unit * kUnit + first * kRow + lane * kRun;
            const int64_t bucket = index / Bucket;
            const Extent own = extent[lane];
            const Grid grid = grid_of(own, bits);
            if (lane % kWidth == 0) {
                store_grid(work.to + item.meta_byte + bucket * kMetaBytes, grid);
            }
            const Coder coder = make_coder(item, work.key, work.levels, grid, own.has_zero(),
                                           own.is_broken(), shifts.at(item, work.key, bucket));
            const float inverse = inverse_of(coder);
            QSDP_UNROLL(8)
            for (int i = 0; i < kTogether; ++i) {
                const int64_t at = index + i * kRow;
                store_stream(work.to + item.data_byte + at / kRun * bits,
                             encode_run(held[lane].row[first + i], coder, inverse, at), bits);
            }
        });
    }
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

template <class T>
QSDP_INLINE void encode_coded(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const bool is_whole = (unit + 1) * kUnit <= item.numel && item.unit_values == kUnit;
    if (is_whole && is_aligned(work.from + item.buffer_byte, sizeof(Words))) {
        switch (item.bucket) {
            case 128:
                return encode_whole_unit<T, 128>(work, unit);
            case 256:
                return encode_whole_unit<T, 256>(work, unit);
            case 512:
                return encode_whole_unit<T, 512>(work, unit);
            case 1024:
                return encode_whole_unit<T, 1024>(work, unit);
            default:
                break;
        }
    }
    const int64_t first = unit * item.per_unit, all = (item.numel + item.bucket - 1) / item.bucket;
    for (int64_t bucket = first; bucket < first + item.per_unit && bucket < all; ++bucket) {
        encode_bucket<T>(work, bucket);
    }
}

template <class T, bool Add>
QSDP_INLINE void decode_coded(const Work& work, int64_t unit) {
    const Item& item = *work.item;
    const int bits = item.bits;
    const int64_t start = unit * item.unit_values, left = item.numel - start;
    const int64_t count = left < item.unit_values ? left : item.unit_values;
    uint8_t* to = work.to + item.buffer_byte + start * sizeof(T);
    const bool is_even = is_aligned(work.to + item.buffer_byte, sizeof(Words));
    const auto bucket_of = [&](int64_t offset) {
        if (item.per_unit == 1) return unit;
        const uint32_t within = static_cast<uint32_t>(offset);
        return unit * item.per_unit + (item.bucket_log2 >= 0
                                           ? within >> item.bucket_log2
                                           : within / static_cast<uint32_t>(item.bucket));
    };
    struct State {
        uint64_t stream[kRows];
        Grid grid[kRows];
        Shifts shifts;
    };
    PerLane<State> state;
    each_lane([&](int lane) { state[lane].shifts = {-1, {}}; });
    for (int64_t base = 0; base < count; base += kUnit) {
        each_lane([&](int lane) {  // many loads on their way at once
            QSDP_UNROLL(8)
            for (int row = 0; row < kRows; ++row) {
                const int64_t offset = base + row * kRow + lane * kRun, rest = count - offset;
                if (rest <= 0) break;
                const int valid = rest < kRun ? static_cast<int>(rest) : kRun;
                state[lane].stream[row] =
                    load_stream(work.from + item.data_byte + (start + offset) / kRun * bits,
                                (valid * bits + 7) / 8);
                const uint8_t* meta = work.from + item.meta_byte + bucket_of(offset) * kMetaBytes;
                state[lane].grid[row] = {load_item<float>(meta), load_item<float>(meta + 4)};
            }
        });
        QSDP_UNROLL(8)
        for (int row = 0; row < kRows; ++row) {
            if (base + row * kRow >= count) break;
            const bool is_whole = is_even && base + (row + 1) * kRow <= count;
            each_lane([&](int lane) {
                const int64_t offset = base + row * kRow + lane * kRun, rest = count - offset;
                if (rest <= 0) return;
                const int valid = rest < kRun ? static_cast<int>(rest) : kRun;
                const Grid grid = state[lane].grid[row];
                const Coder coder =
                    make_coder(item, work.key, work.levels, grid, float_bits(grid.scale) >> 31,
                               false, state[lane].shifts.at(item, work.key, bucket_of(offset)));
                Run run = decode_run(state[lane].stream[row], coder, start + offset, T{});
                uint8_t* out = to + offset * sizeof(T);
                if (Add) {
                    const Run there = is_whole ? load_run(out, T{}) : load_some(out, valid, T{});
                    QSDP_UNROLL(8)
                    for (int i = 0; i < kRun; ++i) {
                        run.x[i] = add_exactly(there.x[i], run.x[i]);
                    }
                }
                if (is_whole) {
                    store_run(out, run, lane, T{});
                } else {
                    store_some(out, run, valid, T{});
                }
            });
        }
    }
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

template <class Job>
QSDP_INLINE int item_of(const Job& job, int64_t unit) {
    int low = 0, high = job.num_items;  // items [low, high) may hold it
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (job.items[middle].first_unit <= unit ? low : high) = middle;
    }
    return low;
}

// Unit number ``unit`` of a job, by one warp.
template <bool Encode, class Job>
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
