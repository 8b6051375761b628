// The CUDA kernels of the operators whose schemas qsdp/ops defines: check, then launch on the
// current stream. Nothing here waits for the GPU. LibTorch stable ABI only.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/codec_call.h"
#include "cuda/launch.h"
#include "cuda/place.h"

namespace {

using qsdp::check_launch;
using qsdp::CodecCall;
using qsdp::Part;
using qsdp::Place;
using torch::stable::Tensor;

void encode_parts(const CodecCall& call, const int64_t* header, const Tensor& buffers,
                  const Tensor& payloads) {
    const Place place(buffers);
    const auto* from = static_cast<const uint8_t*>(buffers.data_ptr());
    auto* to = static_cast<uint8_t*>(payloads.data_ptr());
    for (const Part& part : call.parts) {
        qsdp::encode_on_gpu(
            call.tables[static_cast<size_t>(part.table)].segments, static_cast<uint64_t>(part.key),
            header, call.levels, from + part.buffer * call.buffer_bytes,
            to + part.payload * call.payload_bytes, call.payload_bytes, place.stream());
    }
    check_launch();
}

void decode_parts(const CodecCall& call, const Tensor& payloads, const Tensor& buffers) {
    const Place place(buffers);
    const auto* from = static_cast<const uint8_t*>(payloads.data_ptr());
    auto* to = static_cast<uint8_t*>(buffers.data_ptr());
    for (const Part& part : call.parts) {
        qsdp::decode_on_gpu(call.tables[static_cast<size_t>(part.table)].segments,
                            static_cast<uint64_t>(part.key), call.levels,
                            from + part.payload * call.payload_bytes,
                            to + part.buffer * call.buffer_bytes, part.add != 0, place.stream());
    }
    check_launch();
}

void encode(const Tensor& buffer, const Tensor& table, int64_t key,
            torch::headeronly::HeaderOnlyArrayRef<int64_t> header, const Tensor& payload,
            const std::optional<Tensor>& levels) {
    CodecCall call;
    qsdp::check_codec(buffer, table, key, payload, qsdp::Way::kEncode, levels, qsdp::kCuda, call);
    qsdp::check_header(static_cast<int64_t>(header.size()));
    encode_parts(call, header.data(), buffer, payload);
}

void decode(const Tensor& payload, const Tensor& table, int64_t key, const Tensor& buffer, bool add,
            const std::optional<Tensor>& levels) {
    CodecCall call;
    qsdp::check_codec(buffer, table, key, payload, add ? qsdp::Way::kAdd : qsdp::Way::kDecode,
                      levels, qsdp::kCuda, call);
    decode_parts(call, payload, buffer);
}

void encode_all(const Tensor& buffers, const Tensor& tables, const Tensor& parts,
                torch::headeronly::HeaderOnlyArrayRef<int64_t> header, const Tensor& payloads,
                const std::optional<Tensor>& levels) {
    CodecCall call;
    qsdp::check_codec_all(buffers, tables, parts, payloads, qsdp::Way::kEncode, levels, qsdp::kCuda,
                          call);
    qsdp::check_header(static_cast<int64_t>(header.size()));
    encode_parts(call, header.data(), buffers, payloads);
}

void decode_all(const Tensor& payloads, const Tensor& tables, const Tensor& parts,
                const Tensor& buffers, const std::optional<Tensor>& levels) {
    CodecCall call;
    qsdp::check_codec_all(buffers, tables, parts, payloads, qsdp::Way::kAdd, levels, qsdp::kCuda,
                          call);
    decode_parts(call, payloads, buffers);
}

// Room for what the kernels count on the way, of the current stream.
Tensor starts_of(const std::vector<qsdp::Span>& spans, const Tensor& bitmap) {
    const int64_t size[] = {qsdp::num_starts(spans)};
    return torch::stable::new_empty(bitmap, {size, 1}, torch::headeronly::ScalarType::Long);
}

void compact(const Tensor& dense, const Tensor& spans, const Tensor& bitmap, const Tensor& out,
             bool strict) {
    const std::vector<qsdp::Span> rows = qsdp::check_spans(dense, spans, bitmap, out, qsdp::kCuda);
    const Place place(dense);
    const Tensor starts = starts_of(rows, bitmap);
    qsdp::compact_on_gpu(rows, static_cast<const uint8_t*>(dense.data_ptr()),
                         static_cast<const uint8_t*>(bitmap.data_ptr()),
                         static_cast<uint8_t*>(out.data_ptr()),
                         static_cast<int64_t*>(starts.data_ptr()), strict, place.stream());
    check_launch();
}

void expand(const Tensor& values, const Tensor& spans, const Tensor& bitmap, const Tensor& out) {
    const std::vector<qsdp::Span> rows = qsdp::check_spans(out, spans, bitmap, values, qsdp::kCuda);
    const Place place(out);
    const Tensor starts = starts_of(rows, bitmap);
    qsdp::expand_on_gpu(rows, static_cast<const uint8_t*>(values.data_ptr()),
                        static_cast<const uint8_t*>(bitmap.data_ptr()),
                        static_cast<uint8_t*>(out.data_ptr()),
                        static_cast<int64_t*>(starts.data_ptr()), place.stream());
    check_launch();
}

void count_digits(const Tensor& values, const Tensor& prefix, int64_t shift, int64_t width,
                  const Tensor& counts) {
    const qsdp::KeyType type = qsdp::check_keys(values, qsdp::kCuda);
    qsdp::check_digits(prefix, shift, width, counts, qsdp::kCuda);
    const Place place(values);
    qsdp::count_digits_on_gpu(type, values.data_ptr(), values.numel(),
                              static_cast<const int64_t*>(prefix.data_ptr()),
                              static_cast<int>(shift), static_cast<int>(width),
                              static_cast<int64_t*>(counts.data_ptr()), place.stream());
    check_launch();
}

void mark_above(const Tensor& values, int64_t key, const Tensor& out) {
    const qsdp::KeyType type = qsdp::check_keys(values, qsdp::kCuda);
    qsdp::check_marks(out, values.numel(), qsdp::kCuda);
    const Place place(values);
    qsdp::mark_above_on_gpu(type, values.data_ptr(), values.numel(), key,
                            static_cast<uint8_t*>(out.data_ptr()), place.stream());
    check_launch();
}

void rotate(const Tensor& buffer, const Tensor& stretches) {
    const std::vector<qsdp::RotatedStretch> rows =
        qsdp::check_stretches(buffer, stretches, qsdp::kCuda);
    const Place place(buffer);
    qsdp::rotate_on_gpu(rows, static_cast<uint8_t*>(buffer.data_ptr()), place.stream());
    check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qsdp, CUDA, library) {
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
