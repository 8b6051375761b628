// What a codec call must be given; the same rules as `check` in qsdp/codec/table.py.
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
void check_bytes(const char* name, const torch::stable::Tensor& tensor, Where where = kCpu);

void check_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b);

// How many words a header has.
void check_header(int64_t words);

// Whether decode may add into what the segments say.
void check_adds(const std::vector<Segment>& segments);

// How many learned levels a call is given.
int64_t check_levels(const std::optional<torch::stable::Tensor>& levels);

// Fills ``segments`` with the table's rows after checking each against the sizes.
void check_table(const torch::stable::Tensor& table, int64_t buffer_bytes, int64_t payload_bytes,
                 int64_t num_levels, std::vector<Segment>& segments);

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
