// Magnitudes counted and compared on a GPU; see qsdp/ops/reference/magnitude.py for the
// specification.
#include "common/magnitude.h"
#include "cuda/launch.h"

namespace qsdp {
namespace {

constexpr int kThreads = 512, kItems = 8;
constexpr int64_t kMostBlocks = 2048;  // each strides on through the values

int64_t num_blocks(int64_t num_values) {
    const int64_t blocks = (num_values + kThreads * kItems - 1) / (kThreads * kItems);
    return blocks < kMostBlocks ? blocks : kMostBlocks;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const T* values, int64_t num_values, const int64_t* prefix, int shift, int width,
                 unsigned long long* counts) {
    __shared__ unsigned int bins[kNumBins];
    for (int bin = threadIdx.x; bin < kNumBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const int64_t wanted = *prefix, mask = (int64_t{1} << width) - 1;
    const int64_t stride = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_values; i += stride) {
        const int64_t key = key_of(values[i]);
        if (key >> (shift + width) == wanted) atomicAdd(&bins[key >> shift & mask], 1u);
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kNumBins; bin += kThreads) {
        if (bins[bin] != 0) atomicAdd(&counts[bin], static_cast<unsigned long long>(bins[bin]));
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mark_kernel(const T* values, int64_t num_values, int64_t key, uint8_t* out) {
    const int64_t stride = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_values; i += stride) {
        out[i] = int64_t{key_of(values[i])} > key;
    }
}

}  // namespace

void count_digits_on_gpu(KeyType type, const void* values, int64_t num_values,
                         const int64_t* prefix, int shift, int width, int64_t* counts,
                         cudaStream_t stream) {
    if (num_values == 0) return;
    with_type(type, values, [=](const auto* from) {
        count_kernel<<<static_cast<unsigned>(num_blocks(num_values)), kThreads, 0, stream>>>(
            from, num_values, prefix, shift, width, reinterpret_cast<unsigned long long*>(counts));
    });
}

void mark_above_on_gpu(KeyType type, const void* values, int64_t num_values, int64_t key,
                       uint8_t* out, cudaStream_t stream) {
    if (num_values == 0) return;
    with_type(type, values, [=](const auto* from) {
        mark_kernel<<<static_cast<unsigned>(num_blocks(num_values)), kThreads, 0, stream>>>(
            from, num_values, key, out);
    });
}

}  // namespace qsdp
