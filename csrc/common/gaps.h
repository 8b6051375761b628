// The bytes of a payload that no segment writes. They are zeroed: a payload's bytes are a function
// of what it holds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/segment.h"

namespace qsdp {

// Calls ``gap(from, to)`` for each range of such bytes after the header, in order.
template <class Gap>
void each_gap(const std::vector<Segment>& segments, int64_t payload_bytes, const Gap& gap) {
    // Kept between calls, so that a call allocates nothing.
    thread_local std::vector<std::pair<int64_t, int64_t>> written;
    written.clear();
    for (const Segment& segment : segments) {
        written.emplace_back(segment.data_byte, segment.data_byte + data_bytes(segment));
        if (segment.bits != 0) {
            const int64_t meta_bytes = num_buckets(segment) * kMetaBytes;
            written.emplace_back(segment.meta_byte, segment.meta_byte + meta_bytes);
        }
    }
    written.emplace_back(payload_bytes, payload_bytes);
    std::sort(written.begin(), written.end());
    int64_t end = kHeaderBytes;
    for (const auto& [from, to] : written) {
        if (from > end) gap(end, from);
        end = std::max(end, to);
    }
}

}  // namespace qsdp
