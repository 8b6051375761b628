// Where a call's tensors lie, for the files that register operators.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

namespace qsdp {
namespace {

// Makes a tensor's GPU the current one; its stream.
class Place {
  public:
    explicit Place(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
        void* stream = nullptr;
        if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) !=
            AOTI_TORCH_SUCCESS) {
            throw std::runtime_error("torch knows no current CUDA stream.");
        }
        stream_ = static_cast<cudaStream_t>(stream);
    }
    cudaStream_t stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

inline void check_launch() {
    if (const cudaError_t error = cudaPeekAtLastError(); error != cudaSuccess) {
        throw std::runtime_error(std::string("a CUDA kernel could not be launched (") +
                                 cudaGetErrorString(error) + ").");
    }
}

}  // namespace
}  // namespace qsdp
