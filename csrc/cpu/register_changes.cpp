// The CPU kernels of changes to kept rows: check, share the buckets out to threads, and join what
// they say, or find in a frame what is said of which buckets.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "common/changes.h"
#include "common/check_changes.h"
#include "common/codec_call.h"
#include "common/frame_fault.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace {

using qsdp::ChangedBuckets;
using qsdp::Changes;
using qsdp::Fault;
using qsdp::PlaceInFrame;
using qsdp::refuse_frame;
using qsdp::Segment;
using torch::stable::Tensor;

// Values a thread takes at least, and buckets whose changes it applies: a few tens of microseconds
// of work.
constexpr int64_t kGrain = 1 << 15, kBucketsAtOnce = 1 << 9;

// Kept between calls, so that a call allocates nothing. Other threads have others.
thread_local qsdp::CodecCall own_call;
thread_local std::vector<PlaceInFrame> own_places;
thread_local std::vector<uint8_t> own_flags;
thread_local std::vector<Changes> own_changes;
thread_local std::vector<ChangedBuckets> own_buckets;

// Moves what has changed together, in the order of a body; returns its bytes.
int64_t join(const std::vector<Segment>& segments, const std::vector<PlaceInFrame>& places,
             const std::vector<uint8_t>& is_changed, const std::vector<Changes>& changes,
             uint8_t* frame) {
    std::memset(frame, 0, static_cast<size_t>(qsdp::bitmap_bytes(segments)));
    uint8_t* end = frame + qsdp::bitmap_bytes(segments);
    const auto append = [&](const uint8_t* from, int64_t count) {
        if (from != end && count != 0) std::memmove(end, from, static_cast<size_t>(count));
        end += count;
    };
    for (const bool is_raw : {true, false}) {
        for (size_t s = 0; s < segments.size(); ++s) {
            const Segment& segment = segments[s];
            if (!is_changed[s] || (segment.bits == 0) != is_raw) continue;
            frame[s / 8] |= static_cast<uint8_t>(1u << s % 8);
            uint8_t* from = frame + places[s].start;
            if (is_raw) {
                append(from, data_bytes(segment));
                continue;
            }
            const int64_t num = num_buckets(segment);
            const int64_t count = qsdp::counts_bytes(num, segment.bits);
            if (segment.bits <= qsdp::kNibbleBits) {  // in place: each is read before it is written
                for (int64_t i = 0; i < count; ++i) from[i] = qsdp::counts_byte(from, i, num);
            }
            append(from, count);
        }
    }
    for (const Changes& each : changes) append(each.data, each.data_bytes);
    return end - frame;
}

void encode_changes(const Tensor& buffer, const Tensor& table, int64_t key, const Tensor& kept,
                    const Tensor& modes, int64_t step, int64_t redraw_every, double room,
                    const Tensor& frame, const Tensor& counts) {
    qsdp::check_encode_changes(buffer, table, key, kept, modes, step, redraw_every, room, frame,
                               counts, qsdp::kCpu, own_call);
    const qsdp::SegmentTable& own = own_call.tables[0];
    const std::vector<Segment>& segments = own.segments;
    std::vector<PlaceInFrame>& places = own_places;
    std::vector<uint8_t>& is_changed = own_flags;
    std::vector<Changes>& changes = own_changes;
    qsdp::set_places(segments, places);
    is_changed.assign(segments.size(), 0);
    changes.clear();
    auto* body = static_cast<uint8_t*>(frame.data_ptr());
    const qsdp::Table rows{segments.data(), static_cast<int64_t>(segments.size()),
                           static_cast<uint64_t>(key), nullptr};
    const qsdp::ChangesCall call{.buffer = static_cast<const uint8_t*>(buffer.data_ptr()),
                                 .kept = static_cast<const uint8_t*>(kept.data_ptr()),
                                 .looks = static_cast<const int64_t*>(modes.data_ptr()),
                                 .step = static_cast<int32_t>(step),
                                 .redraw_every = redraw_every,
                                 .room = static_cast<float>(room),
                                 .twice_room = static_cast<float>(2 * room),
                                 .places = places.data(),
                                 .frame = body,
                                 .is_changed = is_changed.data()};
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    std::mutex adding;
    torch::stable::parallel_for(0, own.numel, kGrain, [&](int64_t begin, int64_t end) {
        const Changes found = kernels.encode_changes(rows, call, begin, end);
        const std::lock_guard lock(adding);
        changes.push_back(found);
    });
    std::sort(changes.begin(), changes.end(),
              [](const Changes& a, const Changes& b) { return a.data < b.data; });
    auto* sums = static_cast<int64_t*>(counts.data_ptr());
    sums[0] = join(segments, places, is_changed, changes, body);
    sums[1] = sums[2] = 0;
    for (const Changes& each : changes) sums[1] += each.num_changed, sums[2] += each.num_drawn;
}

// The bytes of a frame's body, taken one after the other.
class Body {
  public:
    explicit Body(const Tensor& frame)
        : start_(static_cast<const uint8_t*>(frame.data_ptr())), size_(frame.numel()) {}

    const uint8_t* take(int64_t count) {
        if (count > size_ - at_) {
            refuse_frame({Fault::kEndsEarly, size_, at_ + count});
        }
        at_ += count;
        return start_ + at_ - count;
    }

    void end() const {
        if (at_ != size_) refuse_frame({Fault::kBytesLeft, size_, at_});
    }

  private:
    const uint8_t* start_;
    int64_t size_, at_ = 0;
};

// Takes the data of a segment's buckets, in stretches that threads may share.
void take_data(const Segment& segment, const uint8_t* counts, Body& body,
               std::vector<ChangedBuckets>& changed) {
    const int64_t num = num_buckets(segment);
    int64_t bytes_of[256];
    for (int head = 0; head < 256; ++head) {
        bytes_of[head] = qsdp::bytes_said(head, segment.bucket, segment.bits);
    }
    for (int64_t first = 0; first < num; first += kBucketsAtOnce) {
        const int64_t last = std::min(num, first + kBucketsAtOnce);
        int64_t bytes = qsdp::bytes_said(qsdp::count_at(counts, last - 1, segment.bits),
                                         qsdp::values_of(segment, last - 1), segment.bits);
        for (int64_t bucket = first; bucket < last - 1; ++bucket) {
            bytes += bytes_of[qsdp::count_at(counts, bucket, segment.bits)];
        }
        if (bytes != 0) changed.push_back({&segment, counts, body.take(bytes), first, last});
    }
}

void apply_changes(const Tensor& frame, const Tensor& table, int64_t step, const Tensor& kept) {
    qsdp::check_apply_changes(frame, table, step, kept, qsdp::kCpu, own_call);
    const std::vector<Segment>& segments = own_call.tables[0].segments;
    std::vector<ChangedBuckets>& changed = own_buckets;
    changed.clear();
    auto* row = static_cast<uint8_t*>(kept.data_ptr());
    Body body(frame);
    const uint8_t* bitmap = body.take(qsdp::bitmap_bytes(segments));
    const size_t num_segments = segments.size();
    if (num_segments % 8 != 0 && bitmap[num_segments / 8] >> num_segments % 8 != 0) {
        refuse_frame({Fault::kSegments, frame.numel(), static_cast<int64_t>(num_segments)});
    }
    const auto has_changed = [&](size_t s) { return bitmap[s / 8] >> s % 8 & 1; };
    for (size_t s = 0; s < num_segments; ++s) {
        if (segments[s].bits != 0 || !has_changed(s)) continue;
        const int64_t count = data_bytes(segments[s]);
        std::memcpy(row + segments[s].data_byte, body.take(count), static_cast<size_t>(count));
    }
    std::vector<const uint8_t*> counts(num_segments);
    for (size_t s = 0; s < num_segments; ++s) {
        const Segment& segment = segments[s];
        if (segment.bits == 0 || !has_changed(s)) continue;
        counts[s] = body.take(qsdp::counts_bytes(num_buckets(segment), segment.bits));
        if (qsdp::counts_too_many(counts[s], segment)) {
            refuse_frame({Fault::kCounts, frame.numel(), 0});
        }
    }
    for (size_t s = 0; s < num_segments; ++s) {
        if (counts[s] != nullptr) take_data(segments[s], counts[s], body, changed);
    }
    body.end();
    const qsdp::Kernels& kernels = qsdp::kernels_in_use();
    std::mutex finding;
    Fault found = Fault::kNone;
    torch::stable::parallel_for(
        0, static_cast<int64_t>(changed.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const Fault fault = kernels.apply_changes(changed[static_cast<size_t>(i)],
                                                          static_cast<int32_t>(step), row);
                if (fault == Fault::kNone) continue;
                const std::lock_guard lock(finding);
                found = fault;
            }
        });
    if (found != Fault::kNone) refuse_frame({found, frame.numel(), 0});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qsdp, CPU, library) {
    library.impl("encode_changes", TORCH_BOX(&encode_changes));
    library.impl("apply_changes", TORCH_BOX(&apply_changes));
}
