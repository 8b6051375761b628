// What a call of an operator must be given; of the codec the same rules as `check_table` and
// `check_tables` in qsdp/codec/segment_table.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/codec_call.h"
#include "common/magnitude.h"
#include "common/rotation.h"
#include "common/span.h"

namespace qsdp {

enum class Where { kCpu, kCuda };
constexpr Where kCpu = Where::kCpu, kCuda = Where::kCuda;

// What is done with payloads: values are made codes, or codes values that overwrite, or are added
// to, what is there.
enum class Way { kEncode, kDecode, kAdd };

// All raise std::invalid_argument (ValueError in Python), with one sentence.

// One table alone, for the sizes that ``call`` has. Fills its table.
void check_table(const torch::stable::Tensor& table,
                 const std::optional<torch::stable::Tensor>& levels, Way way, CodecCall& call);

// What encode and decode are given. Fills ``call`` with one part and its table.
void check_codec(const torch::stable::Tensor& buffer, const torch::stable::Tensor& table,
                 int64_t key, const torch::stable::Tensor& payload, Way way,
                 const std::optional<torch::stable::Tensor>& levels, Where where, CodecCall& call);

// What encode_all and, whose parts may add, decode_all are given. Fills ``call``.
void check_codec_all(const torch::stable::Tensor& buffers, const torch::stable::Tensor& tables,
                     const torch::stable::Tensor& parts, const torch::stable::Tensor& payloads,
                     Way way, const std::optional<torch::stable::Tensor>& levels, Where where,
                     CodecCall& call);

// How many words a header has.
void check_header(int64_t words);

// The table's spans, after checking each against the sizes and, on the CPU, its mask.
std::vector<Span> check_spans(const torch::stable::Tensor& dense,
                              const torch::stable::Tensor& spans,
                              const torch::stable::Tensor& bitmap,
                              const torch::stable::Tensor& compact, Where where = kCpu);

// The table of stretches, after checking that they lie in the buffer one after another.
std::vector<RotatedStretch> check_stretches(const torch::stable::Tensor& buffer,
                                            const torch::stable::Tensor& stretches,
                                            Where where = kCpu);

// What the values of count_digits and mark_above are.
KeyType check_keys(const torch::stable::Tensor& values, Where where = kCpu);

void check_digits(const torch::stable::Tensor& prefix, int64_t shift, int64_t width,
                  const torch::stable::Tensor& counts, Where where = kCpu);

void check_marks(const torch::stable::Tensor& marks, int64_t num_values, Where where = kCpu);

}  // namespace qsdp
