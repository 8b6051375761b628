// What views of bytes must be, which most operators are given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "common/check.h"
#include "common/refuse.h"

namespace qsdp {

// "torch.uint8 of shape (4, 2)", but with the C++ name of the type.
inline std::string description(const torch::stable::Tensor& tensor) {
    std::string sizes;
    for (int64_t d = 0; d < tensor.dim(); ++d) sizes += (d ? ", " : "") + text(tensor.size(d));
    return torch::headeronly::toString(tensor.scalar_type()) + (" of shape (" + sizes + ")");
}

inline bool is_at(const torch::stable::Tensor& tensor, Where where) {
    return where == kCpu ? tensor.is_cpu() : tensor.is_cuda();
}

inline const char* name_of(Where where) {
    return where == kCpu ? "cpu" : "GPU";
}

inline bool is_bytes(const torch::stable::Tensor& tensor, int64_t dim, Where where) {
    return tensor.scalar_type() == torch::headeronly::ScalarType::Byte && tensor.dim() == dim &&
           tensor.is_contiguous() && is_at(tensor, where);
}

inline void check_bytes(const char* name, const torch::stable::Tensor& tensor, Where where) {
    if (is_bytes(tensor, 1, where)) return;
    refuse("the ", name, " is ", description(tensor), ": give a contiguous 1-D uint8 view on the ",
           name_of(where), ".");
}

inline void check_byte_rows(const char* name, const torch::stable::Tensor& tensor, Where where) {
    if (is_bytes(tensor, 2, where)) return;
    refuse("the ", name, " are ", description(tensor), ": give contiguous 2-D uint8 rows on the ",
           name_of(where), ".");
}

inline void check_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
    if (a.is_cuda() && a.get_device_index() != b.get_device_index()) {
        refuse("buffers lie on the GPUs ", a.get_device_index(), " and ", b.get_device_index(),
               ": give both on one.");
    }
}

}  // namespace qsdp
