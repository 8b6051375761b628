// What a warp does with a unit of a job. Included by codec.cu, and by a test that runs it on the
// host.
#pragma once

#include "common/half.h"
#include "common/segment.h"
#include "cuda/decode.h"
#include "cuda/encode.h"
#include "cuda/find_item.h"
#include "cuda/jobs.h"
#include "cuda/memory.h"
#include "cuda/raw.h"
#include "cuda/warp.h"

namespace qsdp {

// What a job turns into what. The last is for coded items that have epochs, the others for those
// that have none.
enum class Turn { kToCodes, kToValues, kKeptToValues };

// Unit number ``unit`` of a job, by one warp.
template <Turn turn>
QSDP_INLINE void run_unit(const Job& job, int64_t unit) {
    constexpr bool kEncodes = turn == Turn::kToCodes, kIsKept = turn == Turn::kKeptToValues;
    if (kEncodes && unit == 0 && job.has_header) {
        each_lane([&](int lane) {
            const int words = kHeaderBytes / 8;
            if (lane < words) store_item(job.to + 8 * lane, job.header[lane]);
        });
    }
    if (unit >= job.num_units) return;
    const int number = find_item(job.items, job.num_items, unit);
    const Item& item = job.items[number];
    const Work work{&item,
                    job.levels,
                    job.key,
                    job.from,
                    job.to,
                    job.add,
                    kIsKept ? job.epoch_bytes[number] : -1};
    const int64_t own = unit - item.first_unit;
    if (!kIsKept && item.kind != Kind::kCoded) {
        copy_unit(work, own, kEncodes);
    } else if constexpr (kEncodes) {
        if (item.dtype == kFp32) return encode_coded<float>(work, own);
        if (item.dtype == kBf16) return encode_coded<Bf16>(work, own);
        encode_coded<Fp16>(work, own);
    } else {
        if (item.dtype == kFp32 && work.add) return decode_coded<float, true, kIsKept>(work, own);
        if (item.dtype == kFp32) return decode_coded<float, false, kIsKept>(work, own);
        if (item.dtype == kBf16) return decode_coded<Bf16, false, kIsKept>(work, own);
        decode_coded<Fp16, false, kIsKept>(work, own);
    }
}

}  // namespace qsdp
