// What encode_changes and apply_changes must be given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/codec_call.h"

namespace qsdp {

// All raise std::invalid_argument (ValueError in Python), with one sentence. They fill ``call``
// with the table of a kept row.

void check_encode_changes(const torch::stable::Tensor& buffer, const torch::stable::Tensor& table,
                          int64_t key, const torch::stable::Tensor& kept,
                          const torch::stable::Tensor& modes, int64_t step, int64_t redraw_every,
                          double room, const torch::stable::Tensor& frame,
                          const torch::stable::Tensor& counts, CodecCall& call);

// What a frame says is not looked at.
void check_apply_changes(const torch::stable::Tensor& frame, const torch::stable::Tensor& table,
                         int64_t step, const torch::stable::Tensor& kept, CodecCall& call);

}  // namespace qsdp
