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
#include "keys.h"
#include "philox.h"

static_assert(std::endian::native == std::endian::little, "payloads are little-endian");

namespace qsdp::QSDP_ISA {
namespace {

// How many values are held as one code a byte before they are packed.
constexpr int64_t kChunk = 1024;
static_assert(kChunk % kBlock == 0);

enum class Noise { kUniform, kDither, kStochastic };

// kPlain: neither zeros nor huge values in the bucket. kZeros: zeros. kFull: huge, perhaps zeros.
// kLevels: learned levels serve it.
enum class Mode { kPlain, kZeros, kFull, kLevels };

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

}  // namespace
}  // namespace qsdp::QSDP_ISA

#include "text_random.h"

#include "text_levels.h"

#include "text_encode.h"

#include "text_decode.h"

#include "text_magnitude.h"

namespace qsdp::QSDP_ISA {
namespace {

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

// The segment's learned levels, or null.
QSDP_INLINE const float* levels_of(const Segment& segment, const Table& table) {
    return segment.levels < 0 ? nullptr : table.levels + segment.levels;
}

void encode_values(const Segment& segment, const Table& table, const uint8_t* buffer,
                   uint8_t* payload, int64_t begin, int64_t end) {
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
    run(segment, table.key, levels_of(segment, table), buffer, payload, first, last);
}

void decode_values(const Segment& segment, const Table& table, const uint8_t* payload,
                   uint8_t* buffer, bool add, int64_t begin, int64_t end) {
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
    run(segment, table.key, levels_of(segment, table), payload, buffer, first, last);
}

void encode(const Table& table, const uint8_t* buffer, uint8_t* payload, int64_t begin,
            int64_t end) {
    int64_t start = 0;
    for (int64_t s = 0; s < table.num_segments && start < end; ++s) {
        const Segment& segment = table.segments[s];
        const int64_t from = begin > start ? begin - start : 0;
        const int64_t to = end - start < segment.numel ? end - start : segment.numel;
        if (from < to) encode_values(segment, table, buffer, payload, from, to);
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
        if (from < valid) decode_values(segment, table, payload, buffer, add, from, valid);
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
