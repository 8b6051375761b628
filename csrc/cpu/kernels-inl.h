// The codec's kernels, written once over a small vector interface (simd.h) and compiled once per
// instruction set. Everything in the -inl.h files follows [Note: Grid] and [Note: Payload] of
// qsdp/ops operation by operation: the bytes must equal the Python kernel's.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/segment.h"
#include "cpu/apply-changes-inl.h"
#include "cpu/bucket-inl.h"
#include "cpu/decode-inl.h"
#include "cpu/encode-changes-inl.h"
#include "cpu/encode-inl.h"
#include "cpu/kernels.h"
#include "cpu/magnitude-inl.h"
#include "cpu/raw-inl.h"
#include "cpu/rotate-inl.h"
#include "cpu/simd.h"

static_assert(std::endian::native == std::endian::little, "payloads are little-endian");

namespace qsdp::QSDP_ISA {
namespace {

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
    with_dtype(segment.dtype, [&](auto type) {
        encode_buckets<decltype(type)>(segment, table.key, levels_of(segment, table), buffer,
                                       payload, first, last);
    });
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
    const float* levels = levels_of(segment, table);
    if (add) {
        decode_buckets<float, true>(segment, table.key, levels, payload, buffer, first, last);
        return;
    }
    with_dtype(segment.dtype, [&](auto type) {
        decode_buckets<decltype(type), false>(segment, table.key, levels, payload, buffer, first,
                                              last);
    });
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
