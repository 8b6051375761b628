// The CPU kernels of qsdp::count_digits and qsdp::mark_above, whose schemas
// qsdp/codec/magnitude.py defines.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <vector>

#include "common/check.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace {

using torch::stable::Tensor;

// Values a thread takes at least: a range costs the adding of 2048 counts.
constexpr int64_t kGrain = 1 << 17;

void count_digits(const Tensor& values, const Tensor& prefix, int64_t shift, int64_t width,
                  const Tensor& counts) {
    const qsdp::KeyType type = qsdp::check_keys(values);
    qsdp::check_digits(prefix, shift, width, counts);
    const int64_t wanted = *static_cast<const int64_t*>(prefix.data_ptr());
    auto* total = static_cast<int64_t*>(counts.data_ptr());
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    std::mutex adding;
    torch::stable::parallel_for(0, values.numel(), kGrain, [&](int64_t begin, int64_t end) {
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
    torch::stable::parallel_for(0, values.numel(), kGrain, [&](int64_t begin, int64_t end) {
        kernels.mark_above(type, values.data_ptr(), begin, end, key, to);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qsdp, CPU, library) {
    library.impl("count_digits", TORCH_BOX(&count_digits));
    library.impl("mark_above", TORCH_BOX(&mark_above));
}
