// Raw segments: values copied, converted, or added to what is there.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/segment.h"
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

}  // namespace
}  // namespace qsdp::QSDP_ISA
