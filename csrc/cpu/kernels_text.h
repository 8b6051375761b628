// The codec's kernels, written once over a small vector interface (simd_*.h) and compiled once per
// instruction set. Include simd_X.h first and define QSDP_ISA as its namespace.
//
// A block is four vectors of values. Everything here follows [Note: Grid] and [Note: Payload] of
// qsdp/codec operation by operation: the bytes must equal the Python kernel's.

#include <bit>
#include <cstdint>
#include <cstring>

#include "grid.h"
#include "half.h"
#include "kernels.h"
#include "philox.h"

static_assert(std::endian::native == std::endian::little, "payloads are little-endian");

namespace qsdp::QSDP_ISA {
namespace {

// How many values are held as one code a byte before they are packed.
constexpr int64_t kChunk = 1024;
static_assert(kChunk % kBlock == 0);

enum class Noise { kUniform, kDither, kStochastic };

// kPlain: neither zeros nor huge values in the bucket. kZeros: zeros. kFull: huge, perhaps zeros.
enum class Mode { kPlain, kZeros, kFull };

template <class T>
QSDP_INLINE void load_block(const uint8_t* from, F (&x)[4]) {
    for (int v = 0; v < 4; ++v) x[v] = load(from + v * kLanes * sizeof(T), T{});
}

// The last ``count`` items of a bucket, followed by copies of the first of them.
template <class T>
struct Tail {
    uint8_t bytes[kBlock * sizeof(T)];

    Tail(const uint8_t* from, int64_t count) {
        memcpy(bytes, from, count * sizeof(T));
        for (int64_t i = count; i < kBlock; ++i) memcpy(bytes + i * sizeof(T), from, sizeof(T));
    }
};

// ---- random numbers -----------------------------------------------------------------------------

// One number a bucket; eight buckets share a Philox block.
class Shifts {
  public:
    explicit Shifts(Stream stream) : stream_(stream) {}

    float at(int64_t bucket) {
        const uint64_t index = static_cast<uint64_t>(bucket);
        if (index / 8 != number_) {
            number_ = index / 8;
            block_ = philox(stream_, number_);
        }
        return centred(half_word(block_, index));
    }

  private:
    Stream stream_;
    uint64_t number_ = ~uint64_t{0};
    PhiloxBlock block_{};
};

// One number a value, as 128 + k / 2**16. Lanes hold 32-bit words with rubbish above them.
QSDP_INLINE void draw(const Stream& stream, uint64_t first_value, F (&out)[4]) {
    const uint64_t first = first_value / 8;
    const uint32_t number = static_cast<uint32_t>(first);
    if (number > UINT32_MAX - kPhiloxLanes) {
        // The block numbers may carry into their high word, which the lanes below share.
        uint8_t bytes[sizeof(float) * kBlock];
        for (uint64_t i = 0; i < kBlock; ++i) {
            const uint32_t half = half_word(philox(stream, first + i / 8), i);
            const float value = bits_float(0x43000000u | half);
            memcpy(bytes + i * sizeof value, &value, sizeof value);
        }
        load_block<float>(bytes, out);
        return;
    }
    uint32_t k0 = static_cast<uint32_t>(stream.key), k1 = static_cast<uint32_t>(stream.key >> 32);
    const U m0 = splat64(kPhiloxMultiplier0), m1 = splat64(kPhiloxMultiplier1);
    // Two of the four words are the same in every lane at first: they are worked on once.
    const uint64_t product1 = uint64_t{stream.parameter} * kPhiloxMultiplier1;
    const uint32_t same0 = static_cast<uint32_t>(product1 >> 32 ^ first >> 32) ^ k0;
    const uint32_t same1 = static_cast<uint32_t>(product1);
    U p0 = mul32(block_numbers(number), m0);
    const U c2 = xor3(high32(p0), splat64(stream.group), splat64(k1));
    k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
    const uint64_t product0 = uint64_t{same0} * kPhiloxMultiplier0;
    U p1 = mul32(c2, m1);
    U w0 = xor3(high32(p1), splat64(same1), splat64(k0)), w1 = p1;
    U w2 = xor3(p0, splat64(product0 >> 32), splat64(k1)), w3 = splat64(product0);
    for (int round = 2; round < kPhiloxRounds; ++round) {
        k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
        p0 = mul32(w0, m0), p1 = mul32(w2, m1);
        w0 = xor3(high32(p1), w1, splat64(k0)), w1 = p1;
        w2 = xor3(high32(p0), w3, splat64(k1)), w3 = p0;
    }
    half_floats(w0, w1, w2, w3, out);
}

// ---- encode -------------------------------------------------------------------------------------

struct Extent {
    float low, high;
    bool has_zero, broken;
};

// ``SkipZeros`` leaves zeros out of low and high; without it they are wrong if has_zero comes back.
template <class T, bool SkipZeros>
Extent measure(const uint8_t* from, int64_t count) {
    const F infinity = splat(INFINITY), minus_infinity = splat(-INFINITY);
    F low[2] = {infinity, infinity}, high[2] = {minus_infinity, minus_infinity};
    I least_bits[2] = {splat_bits(~0u), splat_bits(~0u)};
    I most_bits[2] = {splat_bits(0), splat_bits(0)};
    const auto take = [&](const uint8_t* block) {
        F x[4];
        load_block<T>(block, x);
        for (int v = 0; v < 4; ++v) {
            const I bits = magnitude_bits(x[v]);
            least_bits[v % 2] = min(bits, least_bits[v % 2]);
            most_bits[v % 2] = max(bits, most_bits[v % 2]);
            low[v % 2] = min(SkipZeros ? replace_zeros(x[v], infinity) : x[v], low[v % 2]);
            high[v % 2] = max(SkipZeros ? replace_zeros(x[v], minus_infinity) : x[v], high[v % 2]);
        }
    };
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) take(from + i * sizeof(T));
    if (i < count) take(Tail<T>(from + i * sizeof(T), count - i).bytes);
    return {least(min(low[0], low[1])), greatest(max(high[0], high[1])),
            least(min(least_bits[0], least_bits[1])) == 0,
            greatest(max(most_bits[0], most_bits[1])) >= 0x7F800000u};
}

struct Work {
    WorkingGrid grid;
    float r;        // the bucket's shift
    Stream stream;  // of the values' own numbers
    int levels;     // 2**bits
    bool has_zero;
};

// Codes, one a byte, of ``count`` values; ``first_value`` numbers the first in its segment.
template <class T, Noise noise, Mode mode>
void quantize(const uint8_t* from, int64_t count, const Work& work, int64_t first_value,
              uint8_t* codes) {
    const F factor = splat(work.grid.factor), low = splat(work.grid.low);
    const F inverse = splat(inverse_step(work.grid)), r = splat(work.r);
    const Codes steps = splat_codes(work.levels - (work.has_zero ? 2 : 1));
    const Codes last = splat_codes(work.levels - 1);
    const auto block_codes = [&](const uint8_t* block, int64_t index) {
        F x[4], t[4], own[4];
        load_block<T>(block, x);
        if (noise != Noise::kUniform) draw(work.stream, first_value + index, own);
        for (int v = 0; v < 4; ++v) {
            t[v] = mode == Mode::kFull ? mul(x[v], factor) : x[v];
            t[v] = mul(sub(t[v], low), inverse);
            if (noise == Noise::kUniform) t[v] = sub(t[v], r);
            if (noise == Noise::kDither) {
                t[v] = sub(t[v], add(sub(own[v], splat(128.5f)), splat(0x1p-17f)));
            }
            if (noise == Noise::kStochastic) {
                t[v] = add(t[v], add(sub(own[v], splat(128.0f)), splat(0x1p-17f)));
            }
        }
        // Live values have t >= 0, where truncation is floor; zeros are marked whatever t is.
        Codes out = min(to_codes<noise == Noise::kStochastic>(t), steps);
        if (mode != Mode::kPlain) out = mark_zeros(out, x, last);
        return out;
    };
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) {
        store(codes + i, block_codes(from + i * sizeof(T), i));
    }
    if (i < count) {
        uint8_t tail[kBlock];
        store(tail, block_codes(Tail<T>(from + i * sizeof(T), count - i).bytes, i));
        memcpy(codes + i, tail, count - i);
    }
}

// ``codes`` may be read up to a multiple of eight. Bits past the last code are those of ``codes``.
template <int Bits>
void pack(const uint8_t* codes, int64_t count, uint8_t* to) {
    const int64_t num_bytes = (count * Bits + 7) / 8;
    int64_t i = 0;
    uint64_t word;
    for (; i / 8 * Bits + 8 <= num_bytes; i += 8) {
        memcpy(&word, codes + i, 8);
        word = pack8<Bits>(word);
        memcpy(to + i / 8 * Bits, &word, 8);
    }
    for (; i < count; i += 8) {
        memcpy(&word, codes + i, 8);
        word = pack8<Bits>(word);
        const int64_t left = num_bytes - i / 8 * Bits;
        memcpy(to + i / 8 * Bits, &word, left < Bits ? left : Bits);
    }
}

using Quantize = void (*)(const uint8_t*, int64_t, const Work&, int64_t, uint8_t*);
using Pack = void (*)(const uint8_t*, int64_t, uint8_t*);

constexpr Pack kPack[] = {nullptr, nullptr, pack<2>, pack<3>, pack<4>, pack<5>, pack<6>, pack<7>};

template <class T, Noise noise>
constexpr Quantize kQuantize[] = {quantize<T, noise, Mode::kPlain>,
                                  quantize<T, noise, Mode::kZeros>,
                                  quantize<T, noise, Mode::kFull>};

QSDP_INLINE Mode mode_of(const WorkingGrid& grid, bool has_zero) {
    if (grid.factor != 1.0f) return Mode::kFull;
    return has_zero ? Mode::kZeros : Mode::kPlain;
}

QSDP_INLINE Noise noise_of(const Segment& segment) {
    if (segment.rounding == kDither) return Noise::kDither;
    return segment.rounding == kStochastic ? Noise::kStochastic : Noise::kUniform;
}

QSDP_INLINE Stream stream_of(const Segment& segment, uint64_t key) {
    return {key, static_cast<uint32_t>(segment.parameter), static_cast<uint32_t>(segment.group)};
}

template <class T>
Quantize quantizer(Noise noise, Mode mode) {
    const int m = static_cast<int>(mode);
    if (noise == Noise::kDither) return kQuantize<T, Noise::kDither>[m];
    if (noise == Noise::kStochastic) return kQuantize<T, Noise::kStochastic>[m];
    return kQuantize<T, Noise::kUniform>[m];
}

// Buckets [first, last) of a coded segment.
template <class T>
void encode_buckets(const Segment& segment, uint64_t key, const uint8_t* buffer, uint8_t* payload,
                    int64_t first, int64_t last) {
    const int bits = static_cast<int>(segment.bits);
    const Noise noise = noise_of(segment);
    Shifts shifts(stream_of(segment, key));
    uint8_t codes[kChunk + 8];
    bool expect_zeros = false;  // sparse buckets come in runs: measure those once
    for (int64_t bucket = first; bucket < last; ++bucket) {
        const int64_t start = bucket * segment.bucket;
        const int64_t left = segment.numel - start;
        const int64_t count = left < segment.bucket ? left : segment.bucket;
        const uint8_t* from = buffer + segment.buffer_byte + start * sizeof(T);
        uint8_t* to = payload + segment.data_byte + start / 8 * bits;

        Extent extent =
            expect_zeros ? measure<T, true>(from, count) : measure<T, false>(from, count);
        if (extent.has_zero && !expect_zeros) extent = measure<T, true>(from, count);
        expect_zeros = extent.has_zero;
        const Grid grid = make_grid(extent.low, extent.high, extent.has_zero, extent.broken, bits);
        memcpy(payload + segment.meta_byte + bucket * kMetaBytes, &grid, sizeof grid);
        if (extent.broken) {
            memset(to, 0, (count * bits + 7) / 8);
            continue;
        }
        Work work{working_grid(grid), 0.0f, stream_of(segment, key), 1 << bits, extent.has_zero};
        if (segment.rounding == kShift) work.r = shifts.at(bucket);
        const Quantize run = quantizer<T>(noise, mode_of(work.grid, extent.has_zero));
        if (bits == 8) {
            run(from, count, work, start, to);
            continue;
        }
        for (int64_t i = 0; i < count; i += kChunk) {
            const int64_t chunk = count - i < kChunk ? count - i : kChunk;
            run(from + i * sizeof(T), chunk, work, start + i, codes);
            memset(codes + chunk, 0, 8);
            kPack[bits](codes, chunk, to + i / 8 * bits);
        }
    }
}

// ---- decode -------------------------------------------------------------------------------------

template <int Bits>
void unpack(const uint8_t* from, int64_t count, uint8_t* codes) {
    const int64_t num_bytes = (count * Bits + 7) / 8;
    int64_t i = 0;
    uint64_t word;
    for (; i / 8 * Bits + 8 <= num_bytes; i += 8) {
        memcpy(&word, from + i / 8 * Bits, 8);
        word = unpack8<Bits>(word);
        memcpy(codes + i, &word, 8);
    }
    for (; i < count; i += 8) {
        const int64_t left = num_bytes - i / 8 * Bits;
        word = 0;
        memcpy(&word, from + i / 8 * Bits, left < Bits ? left : Bits);
        word = unpack8<Bits>(word);
        memcpy(codes + i, &word, 8);
    }
}

template <class T>
constexpr float kLargest = 0;
template <>
constexpr float kLargest<float> = 0x1.fffffep127f;
template <>
constexpr float kLargest<Bf16> = 0x1.fep127f;
template <>
constexpr float kLargest<Fp16> = 65504.0f;

// Values of ``count`` codes, stored as T, or with ``Add`` added to what is there.
template <class T, bool Add, Noise noise, Mode mode>
void dequantize(const uint8_t* codes, int64_t count, const Work& work, int64_t first_value,
                uint8_t* to) {
    const F low = splat(work.grid.low), step = splat(work.grid.step), r = splat(work.r);
    const F unscale = splat(1.0f / work.grid.factor);
    const F zero_code = splat(work.has_zero ? static_cast<float>(work.levels - 1) : 256.0f);
    const F limit = splat(kLargest<T>), minus_limit = splat(-kLargest<T>);
    const auto block_values = [&](const uint8_t* block, int64_t index, uint8_t* out) {
        F own[4];
        if (noise == Noise::kDither) draw(work.stream, first_value + index, own);
        for (int v = 0; v < 4; ++v) {
            const F code = widen_codes(block + v * kLanes);
            F value = noise == Noise::kDither
                          ? add(code, add(sub(own[v], splat(128.5f)), splat(0x1p-17f)))
                          : add(code, r);
            value = add(low, mul(value, step));
            if (mode == Mode::kFull) value = mul(value, unscale);
            if (mode != Mode::kPlain) value = zero_where_equal(value, code, zero_code);
            // Elsewhere |value| <= 2**121 or NaN: only fp16 is narrower than that.
            if (mode == Mode::kFull || kLargest<T> < 0x1p121f) {
                value = max(minus_limit, min(limit, value));
            }
            uint8_t* item = out + v * kLanes * sizeof(T);
            store(item, Add ? add(load(item, T{}), value) : value, T{});
        }
    };
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) block_values(codes + i, i, to + i * sizeof(T));
    if (i < count) {
        uint8_t tail_codes[kBlock] = {}, tail[kBlock * sizeof(T)] = {};
        memcpy(tail_codes, codes + i, count - i);
        if (Add) memcpy(tail, to + i * sizeof(T), (count - i) * sizeof(T));
        block_values(tail_codes, i, tail);
        memcpy(to + i * sizeof(T), tail, (count - i) * sizeof(T));
    }
}

constexpr Pack kUnpack[] = {nullptr,   nullptr,   unpack<2>, unpack<3>,
                            unpack<4>, unpack<5>, unpack<6>, unpack<7>};

template <class T, bool Add, Noise noise>
constexpr Quantize kDequantize[] = {dequantize<T, Add, noise, Mode::kPlain>,
                                    dequantize<T, Add, noise, Mode::kZeros>,
                                    dequantize<T, Add, noise, Mode::kFull>};

template <class T, bool Add>
void decode_buckets(const Segment& segment, uint64_t key, const uint8_t* payload, uint8_t* buffer,
                    int64_t first, int64_t last) {
    const int bits = static_cast<int>(segment.bits);
    Shifts shifts(stream_of(segment, key));
    uint8_t codes[kChunk];
    for (int64_t bucket = first; bucket < last; ++bucket) {
        const int64_t start = bucket * segment.bucket;
        const int64_t left = segment.numel - start;
        const int64_t count = left < segment.bucket ? left : segment.bucket;
        const uint8_t* from = payload + segment.data_byte + start / 8 * bits;
        uint8_t* to = buffer + segment.buffer_byte + start * sizeof(T);

        Grid grid;
        memcpy(&grid, payload + segment.meta_byte + bucket * kMetaBytes, sizeof grid);
        const bool has_zero = float_bits(grid.scale) >> 31;
        Work work{working_grid(grid), 0.0f, stream_of(segment, key), 1 << bits, has_zero};
        if (segment.rounding == kShift) work.r = shifts.at(bucket);
        const int mode = static_cast<int>(mode_of(work.grid, has_zero));
        const Quantize run = segment.rounding == kDither
                                 ? kDequantize<T, Add, Noise::kDither>[mode]
                                 : kDequantize<T, Add, Noise::kUniform>[mode];
        if (bits == 8) {
            run(from, count, work, start, to);
            continue;
        }
        for (int64_t i = 0; i < count; i += kChunk) {
            const int64_t chunk = count - i < kChunk ? count - i : kChunk;
            kUnpack[bits](from + i / 8 * bits, chunk, codes);
            run(codes, chunk, work, start + i, to + i * sizeof(T));
        }
    }
}

// ---- raw segments -------------------------------------------------------------------------------

template <class From, class To, bool Add>
void convert(const uint8_t* from, uint8_t* to, int64_t count) {
    const auto block = [](const uint8_t* source, uint8_t* out) {
        F x[4];
        load_block<From>(source, x);
        for (int v = 0; v < 4; ++v) {
            uint8_t* item = out + v * kLanes * sizeof(To);
            store(item, Add ? add(load(item, To{}), x[v]) : x[v], To{});
        }
    };
    int64_t i = 0;
    for (; i + kBlock <= count; i += kBlock) block(from + i * sizeof(From), to + i * sizeof(To));
    if (i < count) {
        uint8_t tail[kBlock * sizeof(To)] = {};
        if (Add) memcpy(tail, to + i * sizeof(To), (count - i) * sizeof(To));
        block(Tail<From>(from + i * sizeof(From), count - i).bytes, tail);
        memcpy(to + i * sizeof(To), tail, (count - i) * sizeof(To));
    }
}

using Convert = void (*)(const uint8_t*, uint8_t*, int64_t);

// [from][to] in the order of DType; equal types are copied.
constexpr Convert kConvert[3][3] = {
    {nullptr, convert<float, Bf16, false>, convert<float, Fp16, false>},
    {convert<Bf16, float, false>, nullptr, convert<Bf16, Fp16, false>},
    {convert<Fp16, float, false>, convert<Fp16, Bf16, false>, nullptr},
};
constexpr Convert kConvertAdd[3] = {convert<float, float, true>, convert<Bf16, float, true>,
                                    convert<Fp16, float, true>};

void copy_raw(int64_t from_type, int64_t to_type, const uint8_t* from, uint8_t* to, int64_t count,
              bool add) {
    if (add) {
        kConvertAdd[from_type](from, to, count);
    } else if (from_type == to_type) {
        memcpy(to, from, count * item_bytes(to_type));
    } else {
        kConvert[from_type][to_type](from, to, count);
    }
}

// ---- ranges of a table --------------------------------------------------------------------------

// How many buckets have their first value before value ``end``.
QSDP_INLINE int64_t buckets_before(const Segment& segment, int64_t end) {
    return end / segment.bucket + (end % segment.bucket != 0);
}

void encode_values(const Segment& segment, uint64_t key, const uint8_t* buffer, uint8_t* payload,
                   int64_t begin, int64_t end) {
    if (segment.bits == 0) {
        copy_raw(segment.dtype, segment.wire,
                 buffer + segment.buffer_byte + begin * item_bytes(segment.dtype),
                 payload + segment.data_byte + begin * item_bytes(segment.wire), end - begin,
                 false);
        return;
    }
    const int64_t first = buckets_before(segment, begin), last = buckets_before(segment, end);
    const auto run = segment.dtype == kFp32   ? encode_buckets<float>
                     : segment.dtype == kBf16 ? encode_buckets<Bf16>
                                              : encode_buckets<Fp16>;
    run(segment, key, buffer, payload, first, last);
}

void decode_values(const Segment& segment, uint64_t key, const uint8_t* payload, uint8_t* buffer,
                   bool add, int64_t begin, int64_t end) {
    if (segment.bits == 0) {
        copy_raw(segment.wire, segment.dtype,
                 payload + segment.data_byte + begin * item_bytes(segment.wire),
                 buffer + segment.buffer_byte + begin * item_bytes(segment.dtype), end - begin,
                 add);
        return;
    }
    const int64_t first = buckets_before(segment, begin), last = buckets_before(segment, end);
    const auto run = segment.dtype == kFp32
                         ? add ? decode_buckets<float, true> : decode_buckets<float, false>
                     : segment.dtype == kBf16 ? decode_buckets<Bf16, false>
                                              : decode_buckets<Fp16, false>;
    run(segment, key, payload, buffer, first, last);
}

void encode(const Table& table, const uint8_t* buffer, uint8_t* payload, int64_t begin,
            int64_t end) {
    int64_t start = 0;
    for (int64_t s = 0; s < table.num_segments && start < end; ++s) {
        const Segment& segment = table.segments[s];
        const int64_t from = begin > start ? begin - start : 0;
        const int64_t to = end - start < segment.numel ? end - start : segment.numel;
        if (from < to) encode_values(segment, table.key, buffer, payload, from, to);
        start += segment.numel;
    }
}

void decode(const Table& table, const uint8_t* payload, uint8_t* buffer, bool add, int64_t begin,
            int64_t end) {
    int64_t start = 0;
    for (int64_t s = 0; s < table.num_segments && start < end; ++s) {
        const Segment& segment = table.segments[s];
        const int64_t from = begin > start ? begin - start : 0;
        const int64_t to = end - start < segment.padded ? end - start : segment.padded;
        const int64_t valid = to < segment.numel ? to : segment.numel;
        if (from < valid) decode_values(segment, table.key, payload, buffer, add, from, valid);
        const int64_t padding = from > segment.numel ? from : segment.numel;
        if (padding < to && !add) {
            const int64_t item = item_bytes(segment.dtype);
            memset(buffer + segment.buffer_byte + padding * item, 0, (to - padding) * item);
        }
        start += segment.padded;
    }
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
