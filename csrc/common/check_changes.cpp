#include "common/check_changes.h"

#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>

#include "common/changes.h"
#include "common/check.h"
#include "common/check_bytes.h"
#include "common/refuse.h"

namespace qsdp {
namespace {

// The size of a flat buffer that has no part in a call: more than any row can hold values of, and
// bits that can be counted.
constexpr int64_t kNoBuffer = int64_t{1} << 59;

void check_kept(const CodecCall& call) {
    for (const Segment& segment : call.tables[0].segments) {
        if (segment.bits != 0 && segment.epoch_byte == -1) {
            refuse(
                "a coded segment of a kept row has no epochs: give the table of a layout whose "
                "segments keep them.");
        }
    }
}

void check_step(int64_t step) {
    if (step < 0 || step > std::numeric_limits<int32_t>::max()) {
        refuse("the step is ", step, ": give 0 to ", std::numeric_limits<int32_t>::max(),
               ", as epochs have 32 bits.");
    }
}

bool is_words(const torch::stable::Tensor& tensor, int64_t count) {
    return tensor.scalar_type() == torch::headeronly::ScalarType::Long && tensor.dim() == 1 &&
           tensor.numel() == count && tensor.is_contiguous() && tensor.is_cpu();
}

void check_modes(const torch::stable::Tensor& modes, int64_t num_segments) {
    if (!is_words(modes, num_segments)) {
        refuse("the modes are ", description(modes), ": give contiguous int64 of shape (",
               num_segments, ",) on the cpu.");
    }
    const auto* mode = static_cast<const int64_t*>(modes.data_ptr());
    for (int64_t s = 0; s < num_segments; ++s) {
        if (mode[s] < static_cast<int64_t>(Look::kStill) ||
            mode[s] > static_cast<int64_t>(Look::kTrained)) {
            refuse("a segment's mode is ", mode[s], ": give 0 to 2.");
        }
    }
}

}  // namespace

void check_encode_changes(const torch::stable::Tensor& buffer, const torch::stable::Tensor& table,
                          int64_t key, const torch::stable::Tensor& kept,
                          const torch::stable::Tensor& modes, int64_t step, int64_t redraw_every,
                          double room, const torch::stable::Tensor& frame,
                          const torch::stable::Tensor& counts, CodecCall& call) {
    check_bytes("kept row", kept, kCpu);
    check_bytes("frame", frame, kCpu);
    check_codec(buffer, table, key, kept, Way::kDecode, std::nullopt, kCpu, call);
    check_kept(call);
    const std::vector<Segment>& segments = call.tables[0].segments;
    check_modes(modes, static_cast<int64_t>(segments.size()));
    check_step(step);
    if (redraw_every < 1) refuse("redraw_every is ", redraw_every, ": give 1 step or more.");
    if (!(room > 0.0 && room <= 1.0)) {
        refuse("the room is ", room, ": give more than 0 and at most 1, as a part of the range.");
    }
    if (frame.numel() < most_body_bytes(segments)) {
        refuse("the frame has ", frame.numel(), " bytes: give ", most_body_bytes(segments),
               ", the most that its table may say.");
    }
    if (!is_words(counts, 3)) {
        refuse("the counts are ", description(counts),
               ": give contiguous int64 of shape (3,) on the cpu.");
    }
}

void check_apply_changes(const torch::stable::Tensor& frame, const torch::stable::Tensor& table,
                         int64_t step, const torch::stable::Tensor& kept, CodecCall& call) {
    check_bytes("frame", frame, kCpu);
    check_bytes("kept row", kept, kCpu);
    check_step(step);
    call.buffer_bytes = kNoBuffer;
    call.payload_bytes = kept.numel();
    check_table(table, std::nullopt, Way::kDecode, kCpu, call);
    check_kept(call);
}

}  // namespace qsdp
