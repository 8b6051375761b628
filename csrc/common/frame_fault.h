// What may be wrong with a frame, and how it is refused.
#pragma once

#include <cstdint>

#include "common/refuse.h"

namespace qsdp {

// The last three are of a bucket's data.
enum class Fault { kNone, kEndsEarly, kBytesLeft, kSegments, kCounts, kList, kMap, kCode };

struct FrameFault {
    Fault fault;
    int64_t frame_bytes;
    int64_t number;  // where what it says ends; of kSegments: how many there are
};

[[noreturn]] inline void refuse_frame(const FrameFault& found) {
    const auto refuse_as = [](const auto&... what) {
        refuse("a frame ", what..., ": give what encode_changes wrote for this table.");
    };
    switch (found.fault) {
        case Fault::kEndsEarly:
            refuse_as("of ", found.frame_bytes, " bytes ends before its byte ", found.number);
            break;
        case Fault::kBytesLeft:
            refuse_as("of ", found.frame_bytes, " bytes has no more to say after ", found.number);
            break;
        case Fault::kSegments:
            refuse_as("has changes of more than ", found.number, " segments");
            break;
        case Fault::kCounts:
            refuse_as("counts changes of a bucket that there is not");
            break;
        case Fault::kList:
            refuse_as("lists changes of a bucket that are not in order of place, or outside it");
            break;
        case Fault::kMap:
            refuse_as("maps more changes of a bucket than it has room for, or bits of others");
            break;
        default:
            break;
    }
    refuse(
        "a frame changes a code to one that there is not: give what encode_changes wrote for "
        "this table.");
}

}  // namespace qsdp
