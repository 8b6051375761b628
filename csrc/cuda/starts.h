// Sums of what comes before.
#pragma once

#include <cstdint>

#include "cuda/jobs.h"
#include "cuda/warp.h"

namespace qsdp {

// Makes of each of ``count`` numbers the sum of ``before`` and of those before it, by one warp;
// returns the sum of all.
QSDP_INLINE int64_t start_from(int64_t* numbers, int64_t count, int64_t before) {
    for (int64_t first = 0; first < count; first += kRow) {
        PerLane<int64_t> sums;
        each_lane([&](int lane) {
            sums[lane] = 0;
            for (int i = 0; i < kRun; ++i) {
                const int64_t at = first + lane * kRun + i;
                if (at < count) sums[lane] += numbers[at];
            }
        });
        const int64_t all = sum_before(sums);
        each_lane([&](int lane) {
            int64_t sum = before + sums[lane];
            for (int i = 0; i < kRun; ++i) {
                const int64_t at = first + lane * kRun + i;
                if (at >= count) break;
                const int64_t own = numbers[at];
                numbers[at] = sum;
                sum += own;
            }
        });
        before += all;
    }
    return before;
}

}  // namespace qsdp
