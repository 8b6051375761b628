// Blocks of gradients to their signed Hadamard transforms by warps, in place; see [Note: Rotation]
// in qsdp/ops/reference/rotation.py. A warp takes up to kMostBlock values of a bucket, a run a
// lane.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/half.h"
#include "common/rotation.h"
#include "cuda/find_item.h"
#include "cuda/jobs.h"
#include "cuda/memory.h"
#include "cuda/run.h"
#include "cuda/warp.h"

namespace qsdp {

static_assert(kMostBlock == kRow, "a warp's runs are a block");

struct RotatedItem {
    RotatedStretch stretch;
    int64_t first_unit;  // units of the stretches before it
};

struct RotationJob {
    static constexpr int kMaxStretches = 96;
    uint8_t* buffer;
    int64_t num_units;
    int32_t num_stretches;
    RotatedItem stretches[kMaxStretches];
};
static_assert(sizeof(RotationJob) <= 4096, "more makes every launch slower");

// Units of ``values`` that one bucket begins with.
QSDP_INLINE int64_t units_of_values(int64_t values) {
    return values / kMostBlock + (values % kMostBlock != 0);
}

QSDP_INLINE int64_t num_units(const RotatedStretch& stretch) {
    return stretch.numel / stretch.bucket * units_of_values(stretch.bucket) +
           units_of_values(stretch.numel % stretch.bucket);
}

// Calls ``launch(job)`` with jobs of all stretches.
template <class Launch>
void launch_stretches(const std::vector<RotatedStretch>& stretches, uint8_t* buffer,
                      const Launch& launch) {
    RotationJob job;
    job.buffer = buffer;
    for (size_t i = 0; i < stretches.size();) {
        job.num_stretches = 0, job.num_units = 0;
        for (; i < stretches.size() && job.num_stretches < RotationJob::kMaxStretches; ++i) {
            job.stretches[job.num_stretches++] = {stretches[i], job.num_units};
            job.num_units += num_units(stretches[i]);
        }
        if (job.num_units > 0) launch(job);
    }
}

// A run's values change their signs as those from ``first`` on in their block do. ``count`` values
// are in the unit: each is in the block that its own bits say.
QSDP_INLINE void flip(Run& run, int first, int count) {
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const int in_block = (first + i) & (block_size_of(count, first + i) - 1);
        const uint32_t sign = is_negated(static_cast<uint32_t>(in_block)) << 31;
        run.x[i] = bits_float(float_bits(run.x[i]) ^ sign);
    }
}

// Whether value ``i`` of ``count`` has a partner at a distance of ``h``: its block is larger.
QSDP_INLINE bool has_partner(int count, int i, int h) {
    return i < count && (count ^ i) >= 2 * h;
}

// The sums and differences of ``count`` values, a run a lane. Padding takes part in none.
QSDP_INLINE void add_and_subtract(PerLane<Run>& held, int count) {
    each_lane([&](int lane) {
        QSDP_UNROLL(3)
        for (int h = 1; h < kRun; h *= 2) {
            QSDP_UNROLL(8)
            for (int i = 0; i < kRun; ++i) {
                if ((i & h) != 0 || !has_partner(count, lane * kRun + i, h)) continue;
                const float a = held[lane].x[i], b = held[lane].x[i + h];
                held[lane].x[i] = a + b;
                held[lane].x[i + h] = a - b;
            }
        }
    });
    QSDP_UNROLL(5)
    for (int h = kRun; h < kMostBlock; h *= 2) {
        PerLane<Run> other;
        from_across(held, h / kRun, other);
        each_lane([&](int lane) {
            if (!has_partner(count, lane * kRun, h)) return;
            const bool is_second = (lane * kRun & h) != 0;
            QSDP_UNROLL(8)
            for (int i = 0; i < kRun; ++i) {
                const float own = held[lane].x[i], their = other[lane].x[i];
                held[lane].x[i] = is_second ? their - own : own + their;
            }
        });
    }
}

QSDP_INLINE void store_rotated(uint8_t* to, const Run& run, int lane, float) {
    store_run(to, run, lane, float{});
}
template <class Half>
QSDP_INLINE void store_rotated(uint8_t* to, const Run& run, int, Half) {
    Words words;
    QSDP_UNROLL(8)
    for (int i = 0; i < 4; ++i) {  // sums may overflow, and be NaN
        Half low, high;
        narrow(run.x[2 * i], low);
        narrow(run.x[2 * i + 1], high);
        words.word[i] = low.bits | uint32_t{high.bits} << 16;
    }
    store_as(to, words);
}

template <class T>
QSDP_INLINE void rotate_values(uint8_t* values, int count) {
    const bool is_whole = count == kMostBlock && is_aligned(values, sizeof(Words));
    const auto valid_of = [=](int lane) {
        const int left = count - lane * kRun;
        return left < 0 ? 0 : left < kRun ? left : kRun;
    };
    PerLane<Run> held;
    each_lane([&](int lane) {
        const uint8_t* from = values + lane * kRun * static_cast<int>(sizeof(T));
        const int valid = valid_of(lane);
        held[lane] = Run{};
        if (is_whole) {
            held[lane] = load_run(from, T{});
        } else if (valid > 0) {
            held[lane] = load_some(from, valid, T{});
        }
        flip(held[lane], lane * kRun, count);
    });
    add_and_subtract(held, count);
    each_lane([&](int lane) {
        Run& run = held[lane];
        QSDP_UNROLL(8)
        for (int i = 0; i < kRun; ++i)
            run.x[i] *= block_scale(block_size_of(count, lane * kRun + i));
        flip(run, lane * kRun, count);
        QSDP_UNROLL(8)
        for (int i = 0; i < kRun; ++i) run.x[i] = canonical(run.x[i]);
        uint8_t* to = values + lane * kRun * static_cast<int>(sizeof(T));
        const int valid = valid_of(lane);
        if (is_whole) {
            store_rotated(to, run, lane, T{});
        } else if (valid > 0) {
            store_some(to, run, valid, T{});
        }
    });
}

// Unit number ``unit`` of a job, by one warp.
QSDP_INLINE void rotate_unit(const RotationJob& job, int64_t unit) {
    if (unit >= job.num_units) return;
    const RotatedItem& item = job.stretches[find_item(job.stretches, job.num_stretches, unit)];
    const RotatedStretch& stretch = item.stretch;
    const int64_t own = unit - item.first_unit, a_bucket = units_of_values(stretch.bucket);
    const int64_t before = own % a_bucket * kMostBlock;
    const int64_t start = own / a_bucket * stretch.bucket + before;
    int64_t count = stretch.bucket - before;
    if (count > kMostBlock) count = kMostBlock;
    if (count > stretch.numel - start) count = stretch.numel - start;
    uint8_t* values = job.buffer + stretch.byte + start * item_bytes(stretch.dtype);
    const int size = static_cast<int>(count);
    if (stretch.dtype == kFp32) return rotate_values<float>(values, size);
    if (stretch.dtype == kBf16) return rotate_values<Bf16>(values, size);
    rotate_values<Fp16>(values, size);
}

}  // namespace qsdp
