// The CPU kernels of qsdp::encode and qsdp::decode, whose schemas qsdp/codec/ops.py defines.
// LibTorch stable ABI only: one build serves torch 2.11 and later.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace {

using qsdp::Segment;
using torch::stable::Tensor;

// Values a thread takes at least: a few tens of microseconds of work.
constexpr int64_t kGrain = 1 << 15;

// Kept between calls, so that a call allocates nothing.
thread_local std::vector<Segment> segments;
thread_local std::vector<std::pair<int64_t, int64_t>> written;

// Zeroes what no segment writes: a payload's bytes are a function of what it holds.
void zero_gaps(uint8_t* payload, int64_t payload_bytes) {
    written.clear();
    for (const Segment& segment : segments) {
        written.emplace_back(segment.data_byte, segment.data_byte + data_bytes(segment));
        if (segment.bits != 0) {
            const int64_t meta_bytes = num_buckets(segment) * qsdp::kMetaBytes;
            written.emplace_back(segment.meta_byte, segment.meta_byte + meta_bytes);
        }
    }
    written.emplace_back(payload_bytes, payload_bytes);
    std::sort(written.begin(), written.end());
    int64_t end = qsdp::kHeaderBytes;
    for (const auto& [from, to] : written) {
        if (from > end) std::memset(payload + end, 0, static_cast<size_t>(from - end));
        end = std::max(end, to);
    }
}

// Fills ``segments``; the table lives until the next call.
qsdp::Table checked_table(const Tensor& buffer, const Tensor& table, int64_t key,
                          const Tensor& payload, const std::optional<Tensor>& levels) {
    qsdp::check_bytes("buffer", buffer);
    qsdp::check_bytes("payload", payload);
    const int64_t num_levels = qsdp::check_levels(levels);
    qsdp::check_table(table, buffer.numel(), payload.numel(), num_levels, segments);
    return {segments.data(), static_cast<int64_t>(segments.size()), static_cast<uint64_t>(key),
            levels ? static_cast<const float*>(levels->data_ptr()) : nullptr};
}

void encode(const Tensor& buffer, const Tensor& table, int64_t key,
            torch::headeronly::HeaderOnlyArrayRef<int64_t> header, const Tensor& payload,
            const std::optional<Tensor>& levels) {
    const qsdp::Table work = checked_table(buffer, table, key, payload, levels);
    qsdp::check_header(static_cast<int64_t>(header.size()));
    const auto* from = static_cast<const uint8_t*>(buffer.data_ptr());
    auto* to = static_cast<uint8_t*>(payload.data_ptr());
    std::memcpy(to, header.data(), qsdp::kHeaderBytes);
    zero_gaps(to, payload.numel());

    int64_t num_values = 0;
    for (const Segment& segment : segments) num_values += segment.numel;
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    torch::stable::parallel_for(0, num_values, kGrain, [&](int64_t begin, int64_t end) {
        kernels.encode(work, from, to, begin, end);
    });
}

void decode(const Tensor& payload, const Tensor& table, int64_t key, const Tensor& buffer, bool add,
            const std::optional<Tensor>& levels) {
    const qsdp::Table work = checked_table(buffer, table, key, payload, levels);
    if (add) qsdp::check_adds(segments);
    int64_t num_values = 0;
    for (const Segment& segment : segments) num_values += segment.padded;
    const auto* from = static_cast<const uint8_t*>(payload.data_ptr());
    auto* to = static_cast<uint8_t*>(buffer.data_ptr());
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    torch::stable::parallel_for(0, num_values, kGrain, [&](int64_t begin, int64_t end) {
        kernels.decode(work, from, to, add, begin, end);
    });
}

void compact(const Tensor& dense, const Tensor& spans, const Tensor& bitmap, const Tensor& out,
             bool strict) {
    const auto* from = static_cast<const uint8_t*>(dense.data_ptr());
    const auto* bits = static_cast<const uint8_t*>(bitmap.data_ptr());
    auto* to = static_cast<uint8_t*>(out.data_ptr());
    bool is_clean = true;
    for (const qsdp::Span& span : qsdp::check_spans(dense, spans, bitmap, out)) {
        const uint8_t* values = from + span.dense_byte;
        uint8_t* kept = to + span.compact_byte;
        if (span.bitmap_byte < 0) {
            std::memcpy(kept, values, static_cast<size_t>(span.numel * span.item));
            continue;
        }
        const auto copy = span.item == 4   ? qsdp::compact_span<4>
                          : span.item == 2 ? qsdp::compact_span<2>
                                           : qsdp::compact_span<1>;
        is_clean &= copy(values, bits + span.bitmap_byte, span.numel, kept, strict);
    }
    if (!is_clean) {
        throw std::runtime_error(
            "a weight outside the mask is not zero: the sparse wire would drop it; tell the handle "
            "of another support (set_support) after editing weights");
    }
}

void expand(const Tensor& values, const Tensor& spans, const Tensor& bitmap, const Tensor& out) {
    const auto* from = static_cast<const uint8_t*>(values.data_ptr());
    const auto* bits = static_cast<const uint8_t*>(bitmap.data_ptr());
    auto* to = static_cast<uint8_t*>(out.data_ptr());
    for (const qsdp::Span& span : qsdp::check_spans(out, spans, bitmap, values)) {
        const uint8_t* kept = from + span.compact_byte;
        uint8_t* dense = to + span.dense_byte;
        if (span.bitmap_byte < 0) {
            std::memcpy(dense, kept, static_cast<size_t>(span.numel * span.item));
            continue;
        }
        const auto copy = span.item == 4   ? qsdp::expand_span<4>
                          : span.item == 2 ? qsdp::expand_span<2>
                                           : qsdp::expand_span<1>;
        copy(kept, bits + span.bitmap_byte, span.numel, dense);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qsdp, CPU, library) {
    library.impl("compact", TORCH_BOX(&compact));
    library.impl("expand", TORCH_BOX(&expand));
    library.impl("encode", TORCH_BOX(&encode));
    library.impl("decode", TORCH_BOX(&decode));
}
