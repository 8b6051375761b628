// The bodies of the CUDA kernels, run by the host one warp after another; see gpu_kernels.py here.
#include "cuda/apply_changes.h"
#include "cuda/changes_job.h"
#include "cuda/compact.h"
#include "cuda/encode_changes.h"
#include "cuda/rotate.h"
#include "cuda/unit.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<qsdp::Segment> segments_of(const int64_t* table, int64_t rows) {
    std::vector<qsdp::Segment> segments(static_cast<size_t>(rows));
    if (rows > 0) memcpy(segments.data(), table, segments.size() * sizeof(qsdp::Segment));
    return segments;
}

template <qsdp::Turn turn>
void run_units(const qsdp::Job& job) {
    for (int64_t unit = 0; unit < job.num_units + 7; ++unit) qsdp::run_unit<turn>(job, unit);
}

template <bool Compact>
void emulate_spans(const uint8_t* from, const int64_t* table, int64_t rows, const uint8_t* bitmap,
                   uint8_t* to, bool strict) {
    std::vector<qsdp::Span> spans(static_cast<size_t>(rows));
    if (rows > 0) memcpy(spans.data(), table, spans.size() * sizeof(qsdp::Span));
    std::vector<int64_t> starts(static_cast<size_t>(qsdp::num_units(spans)), -1);
    const auto run = [](const qsdp::SpanJob& job) {
        for (int64_t i = 0; i < job.num_units + 7; ++i) qsdp::count_unit(job, i);
        for (int64_t i = 0; i < job.num_spans + 7; ++i) qsdp::start_units(job, i);
        for (int64_t i = 0; i < job.num_units + 7; ++i) qsdp::move_unit<Compact>(job, i);
    };
    qsdp::launch_spans(spans, from, bitmap, to, starts.data(), strict, run);
}

// Memory of exactly ``bytes``, so that a sanitizer sees what reaches outside; a board's address is
// even.
class Exactly {
  public:
    explicit Exactly(int64_t bytes) : bytes_(new uint8_t[static_cast<size_t>(bytes)]) {
        memset(bytes_, 0xC5, static_cast<size_t>(bytes));
    }
    ~Exactly() { delete[] bytes_; }
    Exactly(const Exactly&) = delete;
    Exactly& operator=(const Exactly&) = delete;
    uint8_t* data() { return bytes_; }

  private:
    uint8_t* bytes_;
};

template <class Job>
void each_unit(const Job& job, void (*step)(const Job&, int64_t)) {
    for (int64_t unit = 0; unit < job.board.num_units + 3; ++unit) step(job, unit);
}

}  // namespace

extern "C" void emulate_encode_changes(const uint8_t* buffer, const int64_t* table, int64_t rows,
                                       uint64_t key, const uint8_t* kept, const int64_t* modes,
                                       int64_t step, int64_t redraw_every, double room,
                                       uint8_t* frame, int64_t* counts) {
    const qsdp::ChangesPlan plan(segments_of(table, rows), modes);
    Exactly board(plan.board_bytes()), said(plan.room_bytes);
    const qsdp::EncodeChanges job{.board = plan.board(board.data()),
                                  .buffer = buffer,
                                  .kept = kept,
                                  .room = said.data(),
                                  .frame = frame,
                                  .key = key,
                                  .step = static_cast<int32_t>(step),
                                  .every = qsdp::redraw_steps(redraw_every),
                                  .grid_room = static_cast<float>(room),
                                  .twice_grid_room = static_cast<float>(2 * room)};
    qsdp::deliver(plan.items, job.board, qsdp::take_delivery);
    each_unit(job, qsdp::say_unit);
    qsdp::place_said(job);
    each_unit(job, qsdp::join_unit);
    counts[0] = job.board.report->body_bytes;
    counts[1] = job.board.report->num_changed;
    counts[2] = job.board.report->num_drawn;
}

// Why the frame is refused, or null.
extern "C" const char* emulate_apply_changes(const uint8_t* frame, int64_t frame_bytes,
                                             const int64_t* table, int64_t rows, int64_t step,
                                             uint8_t* kept) {
    const qsdp::ChangesPlan plan(segments_of(table, rows), nullptr);
    Exactly board(plan.board_bytes()), body(frame_bytes);
    if (frame_bytes > 0) memcpy(body.data(), frame, static_cast<size_t>(frame_bytes));
    const qsdp::ApplyChanges job{.board = plan.board(board.data()),
                                 .frame = body.data(),
                                 .frame_bytes = frame_bytes,
                                 .kept = kept,
                                 .step = static_cast<int32_t>(step)};
    qsdp::deliver(plan.items, job.board, qsdp::take_delivery);
    qsdp::place_frame(job);
    each_unit(job, qsdp::count_data);
    qsdp::start_data(job);
    each_unit(job, qsdp::apply_unit);
    static std::string told;
    try {
        qsdp::refuse_reported(*job.board.report, frame_bytes);
    } catch (const std::invalid_argument& refusal) {
        told = refusal.what();
        return told.c_str();
    }
    return nullptr;
}

extern "C" void emulate_compact(const uint8_t* dense, const int64_t* table, int64_t rows,
                                const uint8_t* bitmap, uint8_t* out, bool strict) {
    emulate_spans<true>(dense, table, rows, bitmap, out, strict);
}

extern "C" void emulate_expand(const uint8_t* values, const int64_t* table, int64_t rows,
                               const uint8_t* bitmap, uint8_t* out) {
    emulate_spans<false>(values, table, rows, bitmap, out, false);
}

extern "C" void emulate_encode(const uint8_t* buffer, const int64_t* table, int64_t rows,
                               uint64_t key, const int64_t* header, uint8_t* payload,
                               int64_t payload_bytes, const float* levels) {
    qsdp::launch_jobs(qsdp::encode_items(segments_of(table, rows), payload_bytes), levels, buffer,
                      payload, key, header, false, run_units<qsdp::Turn::kToCodes>);
}

extern "C" void emulate_decode(const uint8_t* payload, const int64_t* table, int64_t rows,
                               uint64_t key, uint8_t* buffer, bool add, const float* levels) {
    const std::vector<qsdp::Segment> segments = segments_of(table, rows);
    qsdp::launch_jobs(qsdp::decode_items(segments, add), levels, payload, buffer, key, nullptr, add,
                      run_units<qsdp::Turn::kToValues>);
    const qsdp::Items kept = qsdp::kept_items(segments);
    if (kept.all().empty()) return;
    qsdp::launch_jobs(kept, levels, payload, buffer, key, nullptr, add,
                      run_units<qsdp::Turn::kKeptToValues>);
}

extern "C" void emulate_rotate(uint8_t* buffer, const int64_t* table, int64_t rows) {
    std::vector<qsdp::RotatedStretch> stretches(static_cast<size_t>(rows));
    if (rows > 0) memcpy(stretches.data(), table, stretches.size() * sizeof(qsdp::RotatedStretch));
    qsdp::launch_stretches(stretches, buffer, [](const qsdp::RotationJob& job) {
        for (int64_t unit = 0; unit < job.num_units + 7; ++unit) qsdp::rotate_unit(job, unit);
    });
}
