// The bodies of the CUDA kernels, run by the host one warp after another; see gpu_kernels.py here.
#include "cuda/compact.h"
#include "cuda/unit.h"

#include <cstring>
#include <vector>

namespace {

std::vector<qsdp::Segment> segments_of(const int64_t* table, int64_t rows) {
    std::vector<qsdp::Segment> segments(static_cast<size_t>(rows));
    if (rows > 0) memcpy(segments.data(), table, segments.size() * sizeof(qsdp::Segment));
    return segments;
}

template <qsdp::Turn turn>
void run_units(const qsdp::Job& job) {
    for (int64_t unit = 0; unit < job.num_units + 7; ++unit) qsdp::run_unit<turn>(job, unit);
}

template <bool Compact>
void emulate_spans(const uint8_t* from, const int64_t* table, int64_t rows, const uint8_t* bitmap,
                   uint8_t* to, bool strict) {
    std::vector<qsdp::Span> spans(static_cast<size_t>(rows));
    if (rows > 0) memcpy(spans.data(), table, spans.size() * sizeof(qsdp::Span));
    std::vector<int64_t> starts(static_cast<size_t>(qsdp::num_units(spans)), -1);
    const auto run = [](const qsdp::SpanJob& job) {
        for (int64_t i = 0; i < job.num_units + 7; ++i) qsdp::count_unit(job, i);
        for (int64_t i = 0; i < job.num_spans + 7; ++i) qsdp::start_units(job, i);
        for (int64_t i = 0; i < job.num_units + 7; ++i) qsdp::move_unit<Compact>(job, i);
    };
    qsdp::launch_spans(spans, from, bitmap, to, starts.data(), strict, run);
}

}  // namespace

extern "C" void emulate_compact(const uint8_t* dense, const int64_t* table, int64_t rows,
                                const uint8_t* bitmap, uint8_t* out, bool strict) {
    emulate_spans<true>(dense, table, rows, bitmap, out, strict);
}

extern "C" void emulate_expand(const uint8_t* values, const int64_t* table, int64_t rows,
                               const uint8_t* bitmap, uint8_t* out) {
    emulate_spans<false>(values, table, rows, bitmap, out, false);
}

extern "C" void emulate_encode(const uint8_t* buffer, const int64_t* table, int64_t rows,
                               uint64_t key, const int64_t* header, uint8_t* payload,
                               int64_t payload_bytes, const float* levels) {
    qsdp::launch_jobs(qsdp::encode_items(segments_of(table, rows), payload_bytes), levels, buffer,
                      payload, key, header, false, run_units<qsdp::Turn::kToCodes>);
}

extern "C" void emulate_decode(const uint8_t* payload, const int64_t* table, int64_t rows,
                               uint64_t key, uint8_t* buffer, bool add, const float* levels) {
    const std::vector<qsdp::Segment> segments = segments_of(table, rows);
    qsdp::launch_jobs(qsdp::decode_items(segments, add), levels, payload, buffer, key, nullptr, add,
                      run_units<qsdp::Turn::kToValues>);
    const qsdp::Items kept = qsdp::kept_items(segments);
    if (kept.all().empty()) return;
    qsdp::launch_jobs(kept, levels, payload, buffer, key, nullptr, add,
                      run_units<qsdp::Turn::kKeptToValues>);
}
