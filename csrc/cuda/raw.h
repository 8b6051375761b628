// Units without codes: raw values, converted or copied, and zeros.
#pragma once

#include "common/half.h"
#include "common/segment.h"
#include "cuda/jobs.h"
#include "cuda/memory.h"
#include "cuda/run.h"
#include "cuda/warp.h"

namespace qsdp {

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

}  // namespace qsdp
