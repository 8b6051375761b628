// Changes to a kept row, by warps. Any bytes may come: nothing is read or written outside frame and
// row, and what is wrong is reported.
#pragma once

#include <cstdint>

#include "common/changes.h"
#include "common/frame_fault.h"
#include "common/segment.h"
#include "cuda/changes_job.h"
#include "cuda/memory.h"
#include "cuda/raw.h"
#include "cuda/warp.h"

namespace qsdp {

struct ApplyChanges {
    ChangesBoard board;
    const uint8_t* frame;
    int64_t frame_bytes;
    uint8_t* kept;
    int32_t step;
};

// Launches of a call, in this order: take_delivery, place_frame (one warp), count_data (a warp a
// unit), start_data (one warp), apply_unit (a warp a unit). After a fault nothing is done.

QSDP_INLINE void report_fault(const ChangesBoard& board, Fault fault, int64_t number) {
    each_lane([&](int lane) {
        if (lane != 0) return;
        board.report->fault = static_cast<int64_t>(fault);
        board.report->fault_number = number;
    });
}

QSDP_INLINE bool has_fault(const ChangesBoard& board) {
    return board.report->fault != static_cast<int64_t>(Fault::kNone);
}

// On the host: raises std::invalid_argument where a fault was reported.
inline void refuse_reported(const ChangesReport& report, int64_t frame_bytes) {
    const bool is_of_frame = report.fault != static_cast<int64_t>(Fault::kNone);
    const Fault fault = static_cast<Fault>(is_of_frame ? report.fault : report.bucket_fault);
    if (fault != Fault::kNone) refuse_frame({fault, frame_bytes, report.fault_number});
}

// Which segments have changed, and where their raw values and counts lie.
QSDP_INLINE void place_frame(const ApplyChanges& job) {
    const ChangesBoard& board = job.board;
    const int64_t num = board.num_items, bitmap = (num + 7) / 8;
    if (bitmap > job.frame_bytes) return report_fault(board, Fault::kEndsEarly, bitmap);
    if (num % 8 != 0 && job.frame[bitmap - 1] >> num % 8 != 0) {
        return report_fault(board, Fault::kSegments, num);
    }
    each_lane([&](int lane) {  // the lanes that place_items has look at them
        for (int64_t i = lane; i < num; i += kWarp) {
            board.has_changed[i] = job.frame[i / 8] >> i % 8 & 1;
        }
    });
    const int64_t end = place_items(board, false, place_items(board, true, bitmap));
    if (end > job.frame_bytes) return report_fault(board, Fault::kEndsEarly, end);
    each_lane([&](int lane) {
        if (lane == 0) board.report->body_bytes = end;
        for (int64_t i = lane; i < num; i += kWarp) {
            const Segment& segment = board.items[i].segment;
            if (segment.bits != 0 && board.has_changed[i] != 0 &&
                counts_too_many(job.frame + board.starts[i], segment)) {
                board.report->fault = static_cast<int64_t>(Fault::kCounts);
            }
        }
    });
}

// How many bytes the data of a unit's buckets have.
QSDP_INLINE void count_data(const ApplyChanges& job, int64_t unit) {
    const ChangesBoard& board = job.board;
    if (unit >= board.num_units || has_fault(board)) return;
    const int64_t number = item_of(board, unit);
    const ChangesItem& item = board.items[number];
    const Segment& segment = item.segment;
    const Stretch own = stretch_of(item, unit);
    const bool has_data = segment.bits != 0 && board.has_changed[number] != 0;
    PerLane<int64_t> bytes;
    each_lane([&](int lane) {
        bytes[lane] = 0;
        const int64_t bucket = own.first + lane;
        if (!has_data || bucket >= own.last) return;
        const int head = count_at(job.frame + board.starts[number], bucket, segment.bits);
        bytes[lane] = bytes_said(head, values_of(segment, bucket), segment.bits);
    });
    const int64_t all = sum_before(bytes);
    each_lane([&](int lane) {
        if (lane == 0) board.data[unit] = all;
    });
}

QSDP_INLINE void start_data(const ApplyChanges& job) {
    const ChangesBoard& board = job.board;
    if (has_fault(board)) return;
    const int64_t end = start_from(board.data, board.num_units, board.report->body_bytes);
    if (end > job.frame_bytes) return report_fault(board, Fault::kEndsEarly, end);
    if (end < job.frame_bytes) return report_fault(board, Fault::kBytesLeft, end);
}

// A run's codes, and what is wrong with what is said of them.
struct ChangingRun {
    uint64_t codes;
    Fault fault;

    // Code ``place`` of ``bits`` bits, changed by ``by``.
    QSDP_MEMBER void change(int place, int by, int bits) {
        const int shift = place * bits, last = (1 << bits) - 1;
        const int now = static_cast<int>(codes >> shift & static_cast<uint64_t>(last)) + by;
        if (now < 0 || now > last) {
            fault = Fault::kCode;
        } else {
            codes = (codes & ~(static_cast<uint64_t>(last) << shift)) | static_cast<uint64_t>(now)
                                                                            << shift;
        }
    }
};

// All lanes read all of a list.
QSDP_INLINE void apply_list(const uint8_t* data, int num_entries, int count, int bits,
                            PerLane<ChangingRun>& runs) {
    each_lane([&](int lane) {
        ChangingRun& run = runs[lane];
        int before = -1, before_down = 0;
        for (int i = 0; i < num_entries; ++i) {
            const int place = data[i] & 0x7F, down = data[i] >> 7;
            if (place < before || place >= count || (place == before && down != before_down)) {
                run.fault = Fault::kList;
                return;
            }
            before = place, before_down = down;
            if (place / kRun == lane) run.change(place % kRun, down != 0 ? -1 : 1, bits);
        }
    });
}

QSDP_INLINE Fault apply_map(const uint8_t* data, int room, int count, int bits,
                            PerLane<ChangingRun>& runs) {
    const int mask_bytes = (count + 7) / 8, how_bytes = (room + 3) / 4;
    const uint8_t* how = data + mask_bytes;
    PerLane<uint32_t> changed;
    PerLane<int64_t> before;
    each_lane([&](int lane) {
        changed[lane] = lane < mask_bytes ? data[lane] : 0u;
        before[lane] = num_bits(changed[lane]);
        if (changed[lane] >> valid_of(lane, count) != 0) runs[lane].fault = Fault::kMap;
    });
    const int64_t num_changed = sum_before(before);
    if (num_changed > room) return Fault::kMap;
    each_lane([&](int lane) {
        const int64_t left = num_changed - 4 * lane, own = left < 0 ? 0 : left < 4 ? left : 4;
        if (lane < how_bytes && how[lane] >> 2 * own != 0) runs[lane].fault = Fault::kMap;
        int64_t i = before[lane];
        for (int place = 0; place < kRun; ++place) {
            if ((changed[lane] >> place & 1) == 0) continue;
            const int said = how[i / 4] >> i % 4 * 2, by = (said & 2) != 0 ? 2 : 1;
            if (place < valid_of(lane, count)) {
                runs[lane].change(place, (said & 1) != 0 ? -by : by, bits);
            }
            ++i;
        }
    });
    return Fault::kNone;
}

// A bucket whose count byte is ``head``, not 0.
QSDP_INLINE Fault apply_bucket(const ApplyChanges& job, const Segment& segment, int64_t bucket,
                               int head, const uint8_t* data) {
    const int bits = static_cast<int>(segment.bits);
    const int count = static_cast<int>(values_of(segment, bucket));
    uint8_t* row = job.kept + segment.data_byte + codes_start(segment, bucket);
    if (head >= kWhole) {
        if (head == kDrawn) {
            uint8_t* meta = job.kept + segment.meta_byte + bucket * kMetaBytes;
            uint8_t* epoch = job.kept + segment.epoch_byte + bucket * kEpochBytes;
            each_lane([&](int lane) {
                if (lane < kMetaBytes) meta[lane] = data[lane];
                if (lane == 0) store_item(epoch, job.step);
            });
            data += kMetaBytes;
        }
        copy_bytes(data, row, 0, packed_bytes(count, bits));
        return Fault::kNone;
    }
    PerLane<ChangingRun> runs;
    each_lane([&](int lane) {
        const int valid = valid_of(lane, count);
        runs[lane] = {valid > 0 ? load_codes(row, lane, valid, bits) : 0, Fault::kNone};
    });
    if (head <= kMostListed) {
        apply_list(data, head, count, bits, runs);
    } else {
        const Fault fault = apply_map(data, head - kMostListed, count, bits, runs);
        if (fault != Fault::kNone) return fault;
    }
    const auto has = [&](Fault fault) {
        return any(runs, [=](const ChangingRun& run) { return run.fault == fault; });
    };
    if (has(Fault::kList)) return Fault::kList;
    if (has(Fault::kMap)) return Fault::kMap;
    if (has(Fault::kCode)) return Fault::kCode;
    each_lane([&](int lane) {
        const int valid = valid_of(lane, count);
        if (valid > 0) store_codes(row, runs[lane].codes, lane, valid, bits);
    });
    return Fault::kNone;
}

QSDP_INLINE void apply_unit(const ApplyChanges& job, int64_t unit) {
    const ChangesBoard& board = job.board;
    if (unit >= board.num_units || has_fault(board)) return;
    const int64_t number = item_of(board, unit);
    if (board.has_changed[number] == 0) return;
    const ChangesItem& item = board.items[number];
    const Segment& segment = item.segment;
    const Stretch own = stretch_of(item, unit);
    const uint8_t* start = job.frame + board.starts[number];
    if (segment.bits == 0) {
        const int64_t size = item_bytes(segment.wire);
        return copy_bytes(start, job.kept + segment.data_byte, own.first * size, own.last * size);
    }
    const uint8_t* data = job.frame + board.data[unit];
    for (int64_t bucket = own.first; bucket < own.last; ++bucket) {
        const int head = count_at(start, bucket, segment.bits);
        if (head == 0) continue;
        const Fault fault = apply_bucket(job, segment, bucket, head, data);
        if (fault != Fault::kNone) {
            each_lane([&](int lane) {
                if (lane != 0) return;
                keep_greatest(&board.report->bucket_fault, static_cast<int64_t>(fault));
            });
            return;
        }
        data += bytes_said(head, values_of(segment, bucket), segment.bits);
    }
}

}  // namespace qsdp
