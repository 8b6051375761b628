// Copying the values that a mask keeps, and back, by warps: a span is cut into units, the values
// kept of each unit are counted, and the counts of the units before it say where a unit's lie. See
// qsdp/ops/reference/sparse.py for the specification.
#pragma once

#include <cstdio>

#include "common/span.h"
#include "cuda/find_item.h"
#include "cuda/jobs.h"
#include "cuda/memory.h"
#include "cuda/starts.h"
#include "cuda/warp.h"

namespace qsdp {

struct SpanItem {
    Span span;
    int64_t first_unit;  // units of the spans before it
};

struct SpanJob {
    static constexpr int kMaxSpans = 60;
    const uint8_t* from;
    uint8_t* to;
    const uint8_t* bitmap;
    int64_t* starts;  // by unit: how many values it keeps, then how many its span keeps before it
    int64_t num_units;
    int32_t num_spans;
    bool strict;
    SpanItem spans[kMaxSpans];
};
static_assert(sizeof(SpanJob) <= 4096, "more makes every launch slower");

QSDP_INLINE int64_t num_units(const Span& span) {
    return span.numel / kUnit + (span.numel % kUnit != 0);
}

inline int64_t num_units(const std::vector<Span>& spans) {
    int64_t units = 0;
    for (const Span& span : spans) units += num_units(span);
    return units;
}

// Calls ``launch(job)`` with jobs of all spans; ``starts`` has room for all their units.
template <class Launch>
void launch_spans(const std::vector<Span>& spans, const uint8_t* from, const uint8_t* bitmap,
                  uint8_t* to, int64_t* starts, bool strict, const Launch& launch) {
    SpanJob job;
    job.from = from, job.to = to, job.bitmap = bitmap, job.starts = starts, job.strict = strict;
    for (size_t i = 0; i < spans.size();) {
        job.num_spans = 0, job.num_units = 0;
        for (; i < spans.size() && job.num_spans < SpanJob::kMaxSpans; ++i) {
            job.spans[job.num_spans++] = {spans[i], job.num_units};
            job.num_units += num_units(spans[i]);
        }
        if (job.num_units > 0) launch(job);
        job.starts += job.num_units;
    }
}

// Ends the kernel, and with it the use of this GPU by this process: nothing goes on from here with
// wrong numbers, and the host, which does not wait, learns of it at its next call.
QSDP_INLINE void stop(const char* why) {
#if defined(__CUDA_ARCH__)
    // Its words stand on standard error, above those of torch, which names the assertion.
    __assert_fail(why, "qsdp", __LINE__, "the sparse wire");
#else
    printf("qsdp: %s\n", why);
    __builtin_trap();
#endif
}

QSDP_INLINE const SpanItem& span_of(const SpanJob& job, int64_t unit) {
    return job.spans[find_item(job.spans, job.num_spans, unit)];
}

// Which of the values [first, first + 8) are kept: bit i stands for first + i.
QSDP_INLINE uint32_t kept_of(const SpanJob& job, const Span& span, int64_t first) {
    if (first >= span.numel) return 0;
    if (span.bitmap_byte >= 0) {
        return mask_byte(job.bitmap + span.bitmap_byte, first / kRun, span.numel);
    }
    const int64_t left = span.numel - first;
    return left < kRun ? (1u << left) - 1 : 0xFFu;
}

// Counts what a unit keeps.
QSDP_INLINE void count_unit(const SpanJob& job, int64_t unit) {
    if (unit >= job.num_units) return;
    const SpanItem& item = span_of(job, unit);
    const int64_t first = (unit - item.first_unit) * kUnit;
    PerLane<int64_t> counts;
    each_lane([&](int lane) {
        counts[lane] = 0;
        for (int row = 0; row < kRows; ++row) {
            counts[lane] += num_bits(kept_of(job, item.span, first + row * kRow + lane * kRun));
        }
    });
    const int64_t count = sum_before(counts);
    each_lane([&](int lane) {
        if (lane == 0) job.starts[unit] = count;
    });
}

// Makes of a span's counts the sums of those before.
QSDP_INLINE void start_units(const SpanJob& job, int64_t number) {
    if (number >= job.num_spans) return;
    const SpanItem& item = job.spans[number];
    const int64_t count = start_from(job.starts + item.first_unit, num_units(item.span), 0);
    if (count != item.span.count)
        stop("a span does not match its mask: make both from one support.");
}

template <class V, bool Compact>
QSDP_INLINE void move_values(const SpanJob& job, const Span& span, int64_t first, int64_t start) {
    for (int row = 0; row < kRows && first < span.numel; ++row, first += kRow) {
        PerLane<uint32_t> kept;
        PerLane<int64_t> places;
        each_lane([&](int lane) {
            kept[lane] = kept_of(job, span, first + lane * kRun);
            places[lane] = num_bits(kept[lane]);
        });
        const int64_t count = sum_before(places);
        each_lane([&](int lane) {
            const int64_t own = first + lane * kRun;
            int64_t compact = span.compact_byte + (start + places[lane]) * int64_t{sizeof(V)};
            for (int i = 0; i < kRun && own + i < span.numel; ++i) {
                const int64_t dense = span.dense_byte + (own + i) * int64_t{sizeof(V)};
                if (kept[lane] >> i & 1) {
                    const int64_t from = Compact ? dense : compact, to = Compact ? compact : dense;
                    store_item(job.to + to, load_item<V>(job.from + from));
                    compact += sizeof(V);
                } else if constexpr (!Compact) {
                    store_item(job.to + dense, V{0});
                } else if (job.strict && load_item<V>(job.from + dense) != 0) {
                    stop(
                        "a weight outside the mask is not zero, and the sparse wire would drop "
                        "it: tell the handle of another support (set_support) after editing "
                        "weights.");
                }
            }
        });
        start += count;
    }
}

template <bool Compact>
QSDP_INLINE void move_unit(const SpanJob& job, int64_t unit) {
    if (unit >= job.num_units) return;
    const SpanItem& item = span_of(job, unit);
    const int64_t first = (unit - item.first_unit) * kUnit, start = job.starts[unit];
    with_item(item.span.item, [&](auto word) {
        move_values<decltype(word), Compact>(job, item.span, first, start);
    });
}

}  // namespace qsdp
