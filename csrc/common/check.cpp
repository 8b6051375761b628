#include "common/check.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <string>

#include "common/check_bytes.h"
#include "common/refuse.h"
#include "common/rounding.h"

namespace qsdp {
namespace {

using torch::headeronly::ScalarType;

bool is_dtype(int64_t dtype) {
    return dtype >= kFp32 && dtype <= kOpaque;
}

void check_segment(const Segment& segment, int64_t buffer_bytes, int64_t payload_bytes) {
    for (const int64_t dtype : {segment.dtype, segment.wire}) {
        if (!is_dtype(dtype)) refuse("a segment has dtype ", dtype, ": give 0 to 3.");
    }
    if (segment.bits != 0 && (segment.bits < 2 || segment.bits > 8)) {
        refuse("a segment has ", segment.bits, " bits: give 2 to 8, or 0 for raw.");
    }
    if (segment.numel < 0 || segment.numel > segment.padded) {
        refuse("a segment has ", segment.numel, " of ", segment.padded, " values: give 0 to all.");
    }
    const int64_t item = item_bytes(segment.dtype);
    bool fits = inside(segment.buffer_byte, segment.padded, item, 0, buffer_bytes);
    if (segment.bits != 0) {
        if (segment.bucket < 8 || segment.bucket % 8 != 0 || segment.rounding < 0 ||
            segment.rounding >= kNumRoundings) {
            refuse("a segment has buckets of ", segment.bucket, " and rounding ", segment.rounding,
                   ": give a positive multiple of 8 and 0 to ", kNumRoundings - 1, ".");
        }
        if (segment.dtype == kOpaque) {
            refuse("a coded segment is opaque: code fp32, bf16 or fp16.");
        }
        fits &= segment.meta_byte % 4 == 0;
        fits &= inside(segment.meta_byte, num_buckets(segment), kMetaBytes, kHeaderBytes,
                       payload_bytes);
    } else if ((segment.dtype == kOpaque) != (segment.wire == kOpaque)) {
        refuse("a raw segment is opaque on one side only: make both or none opaque.");
    }
    // The values fit in the buffer here, so their bits cannot overflow; else the rest is moot.
    fits = fits && inside(segment.data_byte, data_bytes(segment), 1, kHeaderBytes, payload_bytes);
    if (!fits) {
        refuse("a segment reaches outside its ", buffer_bytes, " buffer bytes or ", payload_bytes,
               " payload bytes: make table, buffer and payload from one layout.");
    }
}

// What the levels hold is not looked at: the kernels are safe whatever it is.
void check_segment_levels(const Segment& segment, int64_t num_levels) {
    if (segment.levels == -1) return;
    if (segment.bits < kLeastLearnedBits || segment.bits > kMostLearnedBits ||
        !properties_of(segment.rounding).has_levels) {
        std::string known;
        for (int64_t rounding = 0; rounding < kNumRoundings; ++rounding) {
            if (!properties_of(rounding).has_levels) continue;
            known += (known.empty() ? "" : " or ") + text(rounding);
        }
        refuse("a segment of learned levels has ", segment.bits, " bits and rounding ",
               segment.rounding, ": give 2 to 6 bits and rounding ", known,
               ", or -1 for the uniform grid.");
    }
    const int64_t count = int64_t{1} << segment.bits;
    if (!inside(segment.levels, count, 1, 0, num_levels)) {
        refuse("a segment's ", count, " levels start at ", segment.levels, " of ", num_levels,
               " floats: give levels that hold them, or -1 for the uniform grid.");
    }
}

void check_levels(const std::optional<torch::stable::Tensor>& levels) {
    if (!levels) return;
    if (levels->scalar_type() != ScalarType::Float || levels->dim() != 1 ||
        !levels->is_contiguous() || !levels->is_cpu()) {
        refuse("the levels are ", description(*levels),
               ": give a contiguous 1-D fp32 tensor on the cpu.");
    }
}

// Epochs are for what keeps its grids: to encode is to draw fresh ones.
void check_segment_epochs(const Segment& segment, int64_t payload_bytes, Way way) {
    if (segment.epoch_byte == -1) return;
    if (way == Way::kEncode) {
        refuse(
            "a segment has epochs, but encode draws fresh grids: give -1 for none, or call "
            "encode_changes.");
    }
    if (segment.bits == 0) refuse("a raw segment has epochs: give -1 for none.");
    if (segment.bucket > kMostKept || !keeps_grids(segment.rounding)) {
        std::string known;
        for (int64_t rounding = 0; rounding < kNumRoundings; ++rounding) {
            if (!keeps_grids(rounding)) continue;
            known += (known.empty() ? "" : " or ") + text(rounding);
        }
        refuse("a segment with epochs has buckets of ", segment.bucket, " and rounding ",
               segment.rounding, ": give at most ", kMostKept, " and ", known,
               ", or -1 for no epochs.");
    }
    if (segment.epoch_byte % 4 != 0 || !inside(segment.epoch_byte, num_buckets(segment),
                                               kEpochBytes, kHeaderBytes, payload_bytes)) {
        refuse("a segment's ", num_buckets(segment), " epochs start at byte ", segment.epoch_byte,
               " of ", payload_bytes, ": give a multiple of 4 that leaves room for them, or -1.");
    }
}

// Where the rows of a table lie, which need not be contiguous.
struct Rows {
    const int64_t* words;
    int64_t num, row_stride, column_stride;
};

void check_rows(const Rows& rows, int64_t num_levels, Way way, const CodecCall& call,
                SegmentTable& table) {
    table.segments.resize(static_cast<size_t>(rows.num));
    table.numel = table.padded = 0;
    table.is_fp32 = true;
    for (int64_t row = 0; row < rows.num; ++row) {
        int64_t fields[kSegmentFields];
        for (int64_t column = 0; column < kSegmentFields; ++column) {
            fields[column] = rows.words[row * rows.row_stride + column * rows.column_stride];
        }
        Segment& segment = table.segments[static_cast<size_t>(row)];
        std::memcpy(&segment, fields, sizeof segment);
        check_segment(segment, call.buffer_bytes, call.payload_bytes);
        check_segment_levels(segment, num_levels);
        check_segment_epochs(segment, call.payload_bytes, way);
        table.numel += segment.numel;
        table.padded += segment.padded;
        table.is_fp32 &= segment.dtype == kFp32;
    }
}

// Of ``num_tables`` tables, whose rows and columns are the last two dimensions. Fills all but the
// parts.
void check_tables(const torch::stable::Tensor& tables, int64_t num_tables, int64_t table_stride,
                  const std::optional<torch::stable::Tensor>& levels, Way way, CodecCall& call) {
    const int64_t dim = tables.dim();
    if (tables.size(dim - 1) != kSegmentFields) {
        refuse("the table has ", tables.size(dim - 1), " columns: give ", kSegmentFields, ".");
    }
    if (call.payload_bytes < kHeaderBytes) {
        refuse("the payload has ", call.payload_bytes, " bytes: give the ", kHeaderBytes,
               " of a header or more.");
    }
    check_levels(levels);
    call.levels = levels ? static_cast<const float*>(levels->data_ptr()) : nullptr;
    const int64_t num_levels = levels ? levels->numel() : 0;
    const size_t num = static_cast<size_t>(num_tables);
    if (call.tables.size() < num) call.tables.resize(num);
    Rows rows{static_cast<const int64_t*>(tables.data_ptr()), tables.size(dim - 2),
              tables.stride(dim - 2), tables.stride(dim - 1)};
    for (size_t table = 0; table < num; ++table, rows.words += table_stride) {
        check_rows(rows, num_levels, way, call, call.tables[table]);
    }
}

void check_adds(const SegmentTable& table) {
    if (table.is_fp32) return;
    for (const Segment& segment : table.segments) {
        if (segment.dtype != kFp32) {
            refuse("decode adds into dtype ", segment.dtype, ": give an fp32 buffer and table.");
        }
    }
}

void check_named(const char* name, int64_t which, int64_t count) {
    if (which >= 0 && which < count) return;
    refuse("a part names ", name, " ", which, " of ", count,
           ": give one that is there, counted from 0.");
}

}  // namespace

void check_table(const torch::stable::Tensor& table,
                 const std::optional<torch::stable::Tensor>& levels, Way way, CodecCall& call) {
    if (table.scalar_type() != ScalarType::Long || !table.is_cpu() || table.dim() != 2) {
        refuse("the table is ", torch::headeronly::toString(table.scalar_type()), " of ",
               table.dim(), " dimensions: give int64 rows on the cpu.");
    }
    check_tables(table, 1, 0, levels, way, call);
}

void check_codec(const torch::stable::Tensor& buffer, const torch::stable::Tensor& table,
                 int64_t key, const torch::stable::Tensor& payload, Way way,
                 const std::optional<torch::stable::Tensor>& levels, Where where, CodecCall& call) {
    check_bytes("buffer", buffer, where);
    check_bytes("payload", payload, where);
    check_same_device(buffer, payload);
    call.buffer_bytes = buffer.numel();
    call.payload_bytes = payload.numel();
    check_table(table, levels, way, call);
    if (way == Way::kAdd) check_adds(call.tables[0]);
    call.parts.assign(1, {key, 0, 0, 0, way == Way::kAdd});
}

void check_codec_all(const torch::stable::Tensor& buffers, const torch::stable::Tensor& tables,
                     const torch::stable::Tensor& parts, const torch::stable::Tensor& payloads,
                     Way way, const std::optional<torch::stable::Tensor>& levels, Where where,
                     CodecCall& call) {
    check_byte_rows("buffers", buffers, where);
    check_byte_rows("payloads", payloads, where);
    check_same_device(buffers, payloads);
    if (tables.scalar_type() != ScalarType::Long || !tables.is_cpu() || tables.dim() != 3) {
        refuse("the tables are ", description(tables), ": give int64 [kinds, segments, ",
               kSegmentFields, "] on the cpu.");
    }
    if (parts.scalar_type() != ScalarType::Long || !parts.is_cpu() || parts.dim() != 2) {
        refuse("the parts are ", description(parts), ": give int64 [parts, ", kPartFields,
               "] on the cpu.");
    }
    if (parts.size(1) != kPartFields) {
        refuse("the parts have ", parts.size(1), " columns: give ", kPartFields, ".");
    }
    const int64_t num_buffers = buffers.size(0), num_payloads = payloads.size(0);
    const int64_t num_tables = tables.size(0), num_parts = parts.size(0);
    call.buffer_bytes = buffers.size(1);
    call.payload_bytes = payloads.size(1);
    check_tables(tables, num_tables, tables.stride(0), levels, way, call);
    call.parts.resize(static_cast<size_t>(num_parts));
    const auto* words = static_cast<const int64_t*>(parts.data_ptr());
    const int64_t row_stride = parts.stride(0), column_stride = parts.stride(1);
    for (Part& part : call.parts) {
        int64_t fields[kPartFields];
        for (int64_t column = 0; column < kPartFields; ++column) {
            fields[column] = words[column * column_stride];
        }
        std::memcpy(&part, fields, sizeof part);
        check_named("table", part.table, num_tables);
        check_named("buffer", part.buffer, num_buffers);
        check_named("payload", part.payload, num_payloads);
        const bool may_add = way == Way::kAdd;
        if (part.add != 0 && !(may_add && part.add == 1)) {
            refuse("a part has ADD ", part.add, ": give 0",
                   may_add ? " or 1." : ", since nothing adds to a payload.");
        }
        if (part.add != 0) check_adds(call.tables[static_cast<size_t>(part.table)]);
        words += row_stride;
    }
}

void check_header(int64_t words) {
    if (words * static_cast<int64_t>(sizeof(int64_t)) != kHeaderBytes) {
        refuse("the header has ", words, " words: give 4.");
    }
}

std::vector<Span> check_spans(const torch::stable::Tensor& dense,
                              const torch::stable::Tensor& spans,
                              const torch::stable::Tensor& bitmap,
                              const torch::stable::Tensor& compact, Where where) {
    check_bytes("dense buffer", dense, where);
    check_bytes("bitmap", bitmap, where);
    check_bytes("compact buffer", compact, where);
    check_same_device(dense, bitmap);
    check_same_device(dense, compact);
    if (spans.scalar_type() != ScalarType::Long || !spans.is_cpu() || spans.dim() != 2 ||
        !spans.is_contiguous()) {
        refuse("the spans are ", description(spans), ": give contiguous int64 rows on the cpu.");
    }
    if (spans.size(1) != kSpanFields) {
        refuse("the spans have ", spans.size(1), " columns: give ", kSpanFields, ".");
    }
    std::vector<Span> found(static_cast<size_t>(spans.size(0)));
    std::memcpy(found.data(), spans.data_ptr(), found.size() * sizeof(Span));
    const auto* bits = static_cast<const uint8_t*>(bitmap.data_ptr());
    for (const Span& span : found) {
        bool fits = span.item == 1 || span.item == 2 || span.item == 4;
        fits = fits && 0 <= span.count && span.count <= span.numel && span.bitmap_byte >= -1;
        fits = fits && inside(span.dense_byte, span.numel, span.item, 0, dense.numel());
        fits = fits && inside(span.compact_byte, span.count, span.item, 0, compact.numel());
        if (span.bitmap_byte < 0) {
            fits = fits && span.count == span.numel;
        } else {
            const int64_t bytes = span.numel / 8 + (span.numel % 8 != 0);
            fits = fits && inside(span.bitmap_byte, bytes, 1, 0, bitmap.numel());
            fits = fits &&
                   (where != kCpu || count_bits(bits + span.bitmap_byte, span.numel) == span.count);
        }
        if (!fits) {
            refuse("a span of ", span.count, " of ", span.numel,
                   " values reaches outside its buffers or does not match its mask: make spans, "
                   "bitmap and buffers from one support.");
        }
    }
    return found;
}

std::vector<RotatedStretch> check_stretches(const torch::stable::Tensor& buffer,
                                            const torch::stable::Tensor& stretches, Where where) {
    check_bytes("buffer", buffer, where);
    if (stretches.scalar_type() != ScalarType::Long || !stretches.is_cpu() ||
        stretches.dim() != 2 || !stretches.is_contiguous()) {
        refuse("the stretches are ", description(stretches),
               ": give contiguous int64 rows on the cpu.");
    }
    if (stretches.size(1) != kStretchFields) {
        refuse("the stretches have ", stretches.size(1), " columns: give ", kStretchFields, ".");
    }
    std::vector<RotatedStretch> found(static_cast<size_t>(stretches.size(0)));
    std::memcpy(found.data(), stretches.data_ptr(), found.size() * sizeof(RotatedStretch));
    int64_t end = 0;
    for (const RotatedStretch& each : found) {
        if (each.dtype < 0 || each.dtype >= kOpaque || each.bucket < 8 || each.bucket % 8 != 0) {
            refuse("a stretch has DTYPE ", each.dtype, " and buckets of ", each.bucket,
                   ": give 0 to 2 and a positive multiple of 8.");
        }
        const int64_t item = item_bytes(each.dtype);
        if (each.numel < 0 || !inside(each.byte, each.numel, item, end, buffer.numel())) {
            refuse("a stretch of ", each.numel, " values at byte ", each.byte,
                   " reaches outside the buffer, or into the one before: give stretches in the "
                   "order of the buffer.");
        }
        end = each.byte + each.numel * item;
    }
    return found;
}

KeyType check_keys(const torch::stable::Tensor& values, Where where) {
    if (is_at(values, where) && values.dim() == 1 && values.is_contiguous()) {
        switch (values.scalar_type()) {
            case ScalarType::Float:
                return KeyType::kFp32;
            case ScalarType::BFloat16:
                return KeyType::kBf16;
            case ScalarType::Half:
                return KeyType::kFp16;
            case ScalarType::Long:
                return KeyType::kInt64;
            default:
                break;
        }
    }
    refuse("the values are ", description(values),
           ": give contiguous 1-D fp32, bf16, fp16 or int64.");
}

void check_digits(const torch::stable::Tensor& prefix, int64_t shift, int64_t width,
                  const torch::stable::Tensor& counts, Where where) {
    if (shift < 0 || shift > 62 || width < 1 || width > kDigitBits || shift + width > 63) {
        refuse("cannot count ", width, " bits from bit ", shift, " on: give 1 to 11 below 63.");
    }
    if (prefix.scalar_type() != ScalarType::Long || prefix.numel() != 1 || !is_at(prefix, where)) {
        refuse("the prefix is ", description(prefix), ": give one int64.");
    }
    if (counts.scalar_type() != ScalarType::Long || counts.dim() != 1 ||
        counts.numel() != kNumBins || !counts.is_contiguous() || !is_at(counts, where)) {
        refuse("the counts are ", description(counts), ": give contiguous int64 [2048].");
    }
}

void check_marks(const torch::stable::Tensor& marks, int64_t num_values, Where where) {
    if (marks.scalar_type() != ScalarType::Bool || marks.dim() != 1 ||
        marks.numel() != num_values || !marks.is_contiguous() || !is_at(marks, where)) {
        refuse("the marks are ", description(marks), ": give contiguous bool of shape (",
               num_values, ",).");
    }
}

}  // namespace qsdp
