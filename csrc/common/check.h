// What a call of an operator must be given; of the codec the same rules as `check` in
// qsdp/codec/segment_table.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/magnitude.h"
#include "common/segment.h"
#include "common/span.h"

namespace qsdp {

enum class Where { kCpu, kCuda };
constexpr Where kCpu = Where::kCpu, kCuda = Where::kCuda;

// All raise std::invalid_argument (ValueError in Python), with one sentence.

// What encode and decode are given. Fills ``segments`` with the table's rows after checking each
// against the sizes; returns the learned levels that they name, or null.
const float* check_codec(const torch::stable::Tensor& buffer, const torch::stable::Tensor& table,
                         const torch::stable::Tensor& payload,
                         const std::optional<torch::stable::Tensor>& levels, Where where,
                         std::vector<Segment>& segments);

// How many words a header has.
void check_header(int64_t words);

// Whether decode may add into what the segments say.
void check_adds(const std::vector<Segment>& segments);

// The table's spans, after checking each against the sizes and, on the CPU, its mask.
std::vector<Span> check_spans(const torch::stable::Tensor& dense,
                              const torch::stable::Tensor& spans,
                              const torch::stable::Tensor& bitmap,
                              const torch::stable::Tensor& compact, Where where = kCpu);

// What the values of count_digits and mark_above are.
KeyType check_keys(const torch::stable::Tensor& values, Where where = kCpu);

void check_digits(const torch::stable::Tensor& prefix, int64_t shift, int64_t width,
                  const torch::stable::Tensor& counts, Where where = kCpu);

void check_marks(const torch::stable::Tensor& marks, int64_t num_values, Where where = kCpu);

}  // namespace qsdp
