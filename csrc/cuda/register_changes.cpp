// The CUDA kernels of changes to kept rows: check, launch on the current stream, and wait for what
// the host must know: the size of a body, or whether a frame was one.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "common/changes.h"
#include "common/check_changes.h"
#include "common/codec_call.h"
#include "common/frame_fault.h"
#include "cuda/apply_changes.h"
#include "cuda/changes_job.h"
#include "cuda/encode_changes.h"
#include "cuda/launch.h"
#include "cuda/place.h"

namespace {

using qsdp::ChangesPlan;
using qsdp::ChangesReport;
using qsdp::Fault;
using qsdp::Place;
using torch::stable::Tensor;

// Memory of the current stream.
Tensor bytes_beside(const Tensor& tensor, int64_t count) {
    const int64_t size[] = {count};
    return torch::stable::new_empty(tensor, {size, 1}, torch::headeronly::ScalarType::Byte);
}

ChangesReport wait_for(const ChangesReport* report, const Place& place) {
    qsdp::check_launch();
    ChangesReport found;
    cudaError_t error =
        cudaMemcpyAsync(&found, report, sizeof found, cudaMemcpyDeviceToHost, place.stream());
    if (error == cudaSuccess) error = cudaStreamSynchronize(place.stream());
    if (error != cudaSuccess) {
        throw std::runtime_error(
            std::string("what the kernels of changes report could not be read (") +
            cudaGetErrorString(error) + ").");
    }
    return found;
}

void encode_changes(const Tensor& buffer, const Tensor& table, int64_t key, const Tensor& kept,
                    const Tensor& modes, int64_t step, int64_t redraw_every, double room,
                    const Tensor& frame, const Tensor& counts) {
    qsdp::CodecCall call;
    qsdp::check_encode_changes(buffer, table, key, kept, modes, step, redraw_every, room, frame,
                               counts, qsdp::kCuda, call);
    const ChangesPlan plan(call.tables[0].segments, static_cast<const int64_t*>(modes.data_ptr()));
    const Place place(buffer);
    const Tensor board = bytes_beside(buffer, plan.board_bytes());
    const Tensor said = bytes_beside(buffer, plan.room_bytes);
    const qsdp::EncodeChanges job{
        .board = plan.board(static_cast<uint8_t*>(board.data_ptr())),
        .buffer = static_cast<const uint8_t*>(buffer.data_ptr()),
        .kept = static_cast<const uint8_t*>(kept.data_ptr()),
        .room = static_cast<uint8_t*>(said.data_ptr()),
        .frame = static_cast<uint8_t*>(frame.data_ptr()),
        .key = static_cast<uint64_t>(key),
        .step = static_cast<int32_t>(step),
        .every = qsdp::redraw_steps(redraw_every),
        .grid_room = static_cast<float>(room),
        .twice_grid_room = static_cast<float>(2 * room),
    };
    qsdp::encode_changes_on_gpu(plan, job, place.stream());
    const ChangesReport report = wait_for(job.board.report, place);
    auto* sums = static_cast<int64_t*>(counts.data_ptr());
    sums[0] = report.body_bytes, sums[1] = report.num_changed, sums[2] = report.num_drawn;
}

void apply_changes(const Tensor& frame, const Tensor& table, int64_t step, const Tensor& kept) {
    qsdp::CodecCall call;
    qsdp::check_apply_changes(frame, table, step, kept, qsdp::kCuda, call);
    const ChangesPlan plan(call.tables[0].segments, nullptr);
    const Place place(kept);
    const Tensor board = bytes_beside(kept, plan.board_bytes());
    const qsdp::ApplyChanges job{
        .board = plan.board(static_cast<uint8_t*>(board.data_ptr())),
        .frame = static_cast<const uint8_t*>(frame.data_ptr()),
        .frame_bytes = frame.numel(),
        .kept = static_cast<uint8_t*>(kept.data_ptr()),
        .step = static_cast<int32_t>(step),
    };
    qsdp::apply_changes_on_gpu(plan, job, place.stream());
    qsdp::refuse_reported(wait_for(job.board.report, place), frame.numel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qsdp, CUDA, library) {
    library.impl("encode_changes", TORCH_BOX(&encode_changes));
    library.impl("apply_changes", TORCH_BOX(&apply_changes));
}
