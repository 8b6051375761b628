// The CPU kernels of the operators whose schemas qsdp/ops defines: check, then share the values
// out to threads. LibTorch stable ABI only: one build serves torch 2.11 and later.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/gaps.h"
#include "cpu/compact.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace {

using qsdp::Segment;
using torch::stable::Tensor;

// Values a thread takes at least: a few tens of microseconds of work.
constexpr int64_t kGrain = 1 << 15;

// Kept between calls, so that a call allocates nothing.
thread_local qsdp::Call kept_call;
thread_local std::vector<int64_t> kept_sizes, kept_ends;

// How many values each table has, as ``count`` says of a segment.
const std::vector<int64_t>& sizes_of(const qsdp::Call& call, int64_t Segment::* count) {
    kept_sizes.clear();
    for (int64_t table = 0; table < call.num_tables; ++table) {
        int64_t size = 0;
        for (int64_t i = 0; i < call.num_segments; ++i) size += call.table(table)[i].*count;
        kept_sizes.push_back(size);
    }
    return kept_sizes;
}

// Shares the values of all parts out to threads. Parts that write the same row, which ``row`` says,
// are done in order: those whose rows ascend are laid end to end, and cut into ranges that
// ``work(part, table, begin, end)`` is called with.
template <class Work>
void share_out(const qsdp::Call& call, int64_t qsdp::Part::* row, int64_t Segment::* count,
               const Work& work) {
    const std::vector<int64_t>& sizes = sizes_of(call, count);
    const std::vector<qsdp::Part>& parts = call.parts;
    for (size_t first = 0, last = 0; first < parts.size(); first = last) {
        kept_ends.clear();
        int64_t total = 0;
        do {
            total += sizes[static_cast<size_t>(parts[last].table)];
            kept_ends.push_back(total);
            ++last;
        } while (last < parts.size() && parts[last].*row > parts[last - 1].*row);
        const std::vector<int64_t>& ends = kept_ends;  // this thread's, in all
        const auto work_on = [&, &ends = ends](int64_t begin, int64_t end) {
            auto i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) -
                                         ends.begin());
            for (; begin < end; ++i) {
                const int64_t start = i == 0 ? 0 : ends[i - 1];
                const int64_t stop = std::min(end, ends[i]);
                const qsdp::Part& part = parts[first + i];
                const qsdp::Table table{call.table(part.table), call.num_segments,
                                        static_cast<uint64_t>(part.key), call.levels};
                work(part, table, begin - start, stop - start);
                begin = stop;
            }
        };
        torch::stable::parallel_for(0, total, kGrain, work_on);
    }
}

void encode_parts(const qsdp::Call& call, const int64_t* header, const uint8_t* from, uint8_t* to) {
    std::vector<std::pair<int64_t, int64_t>> gaps;
    int64_t gaps_of = -1;  // which table's these are
    for (const qsdp::Part& part : call.parts) {
        uint8_t* payload = to + part.payload * call.payload_bytes;
        std::memcpy(payload, header, qsdp::kHeaderBytes);
        if (part.table != gaps_of) {
            gaps.clear();
            qsdp::each_gap(
                call.table(part.table), call.num_segments, call.payload_bytes,
                [&](int64_t begin, int64_t end) { gaps.emplace_back(begin, end - begin); });
            gaps_of = part.table;
        }
        for (const auto& [begin, size] : gaps) {
            std::memset(payload + begin, 0, static_cast<size_t>(size));
        }
    }
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    const auto encode_range = [&](const qsdp::Part& part, const qsdp::Table& table, int64_t begin,
                                  int64_t end) {
        kernels.encode(table, from + part.buffer * call.buffer_bytes,
                       to + part.payload * call.payload_bytes, begin, end);
    };
    share_out(call, &qsdp::Part::payload, &Segment::numel, encode_range);
}

void decode_parts(const qsdp::Call& call, const uint8_t* from, uint8_t* to) {
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    const auto decode_range = [&](const qsdp::Part& part, const qsdp::Table& table, int64_t begin,
                                  int64_t end) {
        kernels.decode(table, from + part.payload * call.payload_bytes,
                       to + part.buffer * call.buffer_bytes, part.add != 0, begin, end);
    };
    share_out(call, &qsdp::Part::buffer, &Segment::padded, decode_range);
}

const uint8_t* bytes_of(const Tensor& tensor) {
    return static_cast<const uint8_t*>(tensor.data_ptr());
}

uint8_t* output_of(const Tensor& tensor) {
    return static_cast<uint8_t*>(tensor.data_ptr());
}

void encode(const Tensor& buffer, const Tensor& table, int64_t key,
            torch::headeronly::HeaderOnlyArrayRef<int64_t> header, const Tensor& payload,
            const std::optional<Tensor>& levels) {
    qsdp::check_codec(buffer, table, key, false, payload, levels, qsdp::kCpu, kept_call);
    qsdp::check_header(static_cast<int64_t>(header.size()));
    encode_parts(kept_call, header.data(), bytes_of(buffer), output_of(payload));
}

void decode(const Tensor& payload, const Tensor& table, int64_t key, const Tensor& buffer, bool add,
            const std::optional<Tensor>& levels) {
    qsdp::check_codec(buffer, table, key, add, payload, levels, qsdp::kCpu, kept_call);
    decode_parts(kept_call, bytes_of(payload), output_of(buffer));
}

void encode_all(const Tensor& buffers, const Tensor& tables, const Tensor& parts,
                torch::headeronly::HeaderOnlyArrayRef<int64_t> header, const Tensor& payloads,
                const std::optional<Tensor>& levels) {
    qsdp::check_codec_all(buffers, tables, parts, false, payloads, levels, qsdp::kCpu, kept_call);
    qsdp::check_header(static_cast<int64_t>(header.size()));
    encode_parts(kept_call, header.data(), bytes_of(buffers), output_of(payloads));
}

void decode_all(const Tensor& payloads, const Tensor& tables, const Tensor& parts,
                const Tensor& buffers, const std::optional<Tensor>& levels) {
    qsdp::check_codec_all(buffers, tables, parts, true, payloads, levels, qsdp::kCpu, kept_call);
    decode_parts(kept_call, bytes_of(payloads), output_of(buffers));
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
}
