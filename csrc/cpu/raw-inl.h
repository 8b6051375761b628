// Raw segments: values copied, converted, or added to what is there.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "cpu/block-inl.h"
#include "cpu/simd.h"

namespace qsdp::QSDP_ISA {
namespace {

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

void copy_raw(int64_t from_type, int64_t to_type, const uint8_t* from, uint8_t* to, int64_t count,
              bool add) {
    if (from_type == to_type && !add) {
        memcpy(to, from, count * item_bytes(to_type));
        return;
    }
    with_dtype(from_type, [&](auto source) {
        using From = decltype(source);
        if (add) return convert<From, float, true>(from, to, count);
        with_dtype(to_type, [&](auto target) {
            using To = decltype(target);
            if constexpr (!std::is_same_v<From, To>) convert<From, To, false>(from, to, count);
        });
    });
}

}  // namespace
}  // namespace qsdp::QSDP_ISA
