// The CPU kernels of the operators whose schemas qsdp/ops defines: check, then share the values
// out to threads. LibTorch stable ABI only: one build serves torch 2.11 and later.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/codec_call.h"
#include "common/gaps.h"
#include "cpu/compact.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/share.h"

namespace {

using qsdp::CodecCall;
using qsdp::Part;
using qsdp::SegmentTable;
using torch::stable::Tensor;

// Values a thread takes at least: a few tens of microseconds of work.
constexpr int64_t kGrain = 1 << 15;

// Kept between calls, so that a call allocates nothing. Other threads have others.
thread_local CodecCall own_call;
thread_local qsdp::Share own_share;
using Gaps = std::vector<std::pair<int64_t, int64_t>>;  // starts and sizes
thread_local Gaps own_gaps;

qsdp::Table table_of(const CodecCall& call, const Part& part) {
    const std::vector<qsdp::Segment>& segments =
        call.tables[static_cast<size_t>(part.table)].segments;
    return {segments.data(), static_cast<int64_t>(segments.size()), static_cast<uint64_t>(part.key),
            call.levels};
}

// Calls ``open(part)`` for each part before its values, and ``code(part, from, to)`` for these.
template <class Open, class Code>
void share_out(const CodecCall& call, int64_t Part::* row, int64_t SegmentTable::* values,
               const Open& open, const Code& code) {
    qsdp::Share& share = own_share;
    for (size_t next = 0; next < call.parts.size();) {
        const size_t first = next;
        next = share.take(call, first, row, values);
        for (size_t i = first; i < next; ++i) open(call.parts[i]);
        torch::stable::parallel_for(
            0, share.num_values(), share.grain(kGrain),
            [&](int64_t begin, int64_t end) { share.each(begin, end, code); });
    }
}

void encode_parts(const CodecCall& call, const int64_t* header, const Tensor& buffers,
                  const Tensor& payloads) {
    const auto* from = static_cast<const uint8_t*>(buffers.data_ptr());
    auto* to = static_cast<uint8_t*>(payloads.data_ptr());
    Gaps& gaps = own_gaps;
    int64_t gaps_of = -1;  // which table's they are: most parts have that of the part before
    const auto open = [&](const Part& part) {
        if (part.table != gaps_of) {
            gaps.clear();
            const auto& table = call.tables[static_cast<size_t>(part.table)];
            qsdp::each_gap(table.segments, call.payload_bytes, [&](int64_t first, int64_t last) {
                gaps.emplace_back(first, last - first);
            });
            gaps_of = part.table;
        }
        uint8_t* payload = to + part.payload * call.payload_bytes;
        std::memcpy(payload, header, qsdp::kHeaderBytes);
        for (const auto& [first, size] : gaps) {
            std::memset(payload + first, 0, static_cast<size_t>(size));
        }
    };
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    const auto code = [&](const Part& part, int64_t begin, int64_t end) {
        kernels.encode(table_of(call, part), from + part.buffer * call.buffer_bytes,
                       to + part.payload * call.payload_bytes, begin, end);
    };
    share_out(call, &Part::payload, &SegmentTable::numel, open, code);
}

void decode_parts(const CodecCall& call, const Tensor& payloads, const Tensor& buffers) {
    const auto* from = static_cast<const uint8_t*>(payloads.data_ptr());
    auto* to = static_cast<uint8_t*>(buffers.data_ptr());
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    const auto code = [&](const Part& part, int64_t begin, int64_t end) {
        kernels.decode(table_of(call, part), from + part.payload * call.payload_bytes,
                       to + part.buffer * call.buffer_bytes, part.add != 0, begin, end);
    };
    share_out(call, &Part::buffer, &SegmentTable::padded, [](const Part&) {}, code);
}

void encode(const Tensor& buffer, const Tensor& table, int64_t key,
            torch::headeronly::HeaderOnlyArrayRef<int64_t> header, const Tensor& payload,
            const std::optional<Tensor>& levels) {
    qsdp::check_codec(buffer, table, key, payload, qsdp::Way::kEncode, levels, qsdp::kCpu,
                      own_call);
    qsdp::check_header(static_cast<int64_t>(header.size()));
    encode_parts(own_call, header.data(), buffer, payload);
}

void decode(const Tensor& payload, const Tensor& table, int64_t key, const Tensor& buffer, bool add,
            const std::optional<Tensor>& levels) {
    qsdp::check_codec(buffer, table, key, payload, add ? qsdp::Way::kAdd : qsdp::Way::kDecode,
                      levels, qsdp::kCpu, own_call);
    decode_parts(own_call, payload, buffer);
}

void encode_all(const Tensor& buffers, const Tensor& tables, const Tensor& parts,
                torch::headeronly::HeaderOnlyArrayRef<int64_t> header, const Tensor& payloads,
                const std::optional<Tensor>& levels) {
    qsdp::check_codec_all(buffers, tables, parts, payloads, qsdp::Way::kEncode, levels, qsdp::kCpu,
                          own_call);
    qsdp::check_header(static_cast<int64_t>(header.size()));
    encode_parts(own_call, header.data(), buffers, payloads);
}

void decode_all(const Tensor& payloads, const Tensor& tables, const Tensor& parts,
                const Tensor& buffers, const std::optional<Tensor>& levels) {
    qsdp::check_codec_all(buffers, tables, parts, payloads, qsdp::Way::kAdd, levels, qsdp::kCpu,
                          own_call);
    decode_parts(own_call, payloads, buffers);
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
        qsdp::with_item(span.item, [&](auto word) {
            is_clean &= qsdp::compact_span<sizeof word>(values, bits + span.bitmap_byte, span.numel,
                                                        kept, strict);
        });
    }
    if (!is_clean) {
        throw std::runtime_error(
            "a weight outside the mask is not zero, and the sparse wire would drop it: tell the "
            "handle of another support (set_support) after editing weights.");
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
        qsdp::with_item(span.item, [&](auto word) {
            qsdp::expand_span<sizeof word>(kept, bits + span.bitmap_byte, span.numel, dense);
        });
    }
}

// Values a thread takes at least: a range costs the adding of 2048 counts.
constexpr int64_t kCountGrain = 1 << 17;

void count_digits(const Tensor& values, const Tensor& prefix, int64_t shift, int64_t width,
                  const Tensor& counts) {
    const qsdp::KeyType type = qsdp::check_keys(values);
    qsdp::check_digits(prefix, shift, width, counts);
    const int64_t wanted = *static_cast<const int64_t*>(prefix.data_ptr());
    auto* total = static_cast<int64_t*>(counts.data_ptr());
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    std::mutex adding;
    torch::stable::parallel_for(0, values.numel(), kCountGrain, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> part(qsdp::kNumBins);
        kernels.count_digits(type, values.data_ptr(), begin, end, wanted, static_cast<int>(shift),
                             static_cast<int>(width), part.data());
        const std::lock_guard lock(adding);
        for (int64_t bin = 0; bin < qsdp::kNumBins; ++bin) total[bin] += part[bin];
    });
}

void mark_above(const Tensor& values, int64_t key, const Tensor& out) {
    const qsdp::KeyType type = qsdp::check_keys(values);
    qsdp::check_marks(out, values.numel());
    auto* to = static_cast<uint8_t*>(out.data_ptr());
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    torch::stable::parallel_for(0, values.numel(), kCountGrain, [&](int64_t begin, int64_t end) {
        kernels.mark_above(type, values.data_ptr(), begin, end, key, to);
    });
}

void rotate(const Tensor& buffer, const Tensor& stretches) {
    const std::vector<qsdp::RotatedStretch> rows = qsdp::check_stretches(buffer, stretches);
    int64_t num_values = 0;
    for (const qsdp::RotatedStretch& row : rows) num_values += row.numel;
    auto* values = static_cast<uint8_t*>(buffer.data_ptr());
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    torch::stable::parallel_for(0, num_values, kGrain, [&](int64_t begin, int64_t end) {
        kernels.rotate(rows.data(), static_cast<int64_t>(rows.size()), values, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qsdp, CPU, library) {
    library.impl("encode", TORCH_BOX(&encode));
    library.impl("decode", TORCH_BOX(&decode));
    library.impl("encode_all", TORCH_BOX(&encode_all));
    library.impl("decode_all", TORCH_BOX(&decode_all));
    library.impl("compact", TORCH_BOX(&compact));
    library.impl("expand", TORCH_BOX(&expand));
    library.impl("count_digits", TORCH_BOX(&count_digits));
    library.impl("mark_above", TORCH_BOX(&mark_above));
    library.impl("rotate", TORCH_BOX(&rotate));
}
