// A table of segments as work for warps: items, each cut into units of which a warp takes one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/gaps.h"
#include "common/segment.h"

namespace qsdp {

// Eight consecutive values are a lane's run: ``bits`` whole bytes of codes. A row is a warp's runs.
constexpr int kRun = 8, kRow = 32 * kRun, kRows = 4, kUnit = kRows * kRow;

enum class Kind : int32_t { kCoded, kRaw, kZeros };

struct Item {
    int64_t first_unit;   // units of the items before it
    int64_t unit_values;  // values of each of its units but the last
    int64_t buffer_byte, data_byte, meta_byte;
    int64_t numel;   // values; of kZeros: bytes from data_byte on
    int64_t bucket;  // values; at most ``numel`` rounded up to a run
    uint32_t parameter, group;
    Kind kind;
    int16_t bits, dtype, wire, rounding;
    int32_t levels;       // where its learned levels start in the job's; -1: none
    int32_t per_unit;     // buckets a unit
    int32_t bucket_log2;  // -1: the bucket is no power of two
};

// Appends items and counts their units.
class Items {
  public:
    void add_segment(const Segment& segment) {
        if (segment.numel == 0) return;
        Item item{};
        item.kind = segment.bits == 0 ? Kind::kRaw : Kind::kCoded;
        item.unit_values = 4 * kUnit;
        item.buffer_byte = segment.buffer_byte;
        item.data_byte = segment.data_byte;
        item.meta_byte = segment.meta_byte;
        item.numel = segment.numel;
        if (segment.epoch_byte >= 0) epoch_bytes_.push_back(segment.epoch_byte);
        item.parameter = static_cast<uint32_t>(segment.parameter);
        item.group = static_cast<uint32_t>(segment.group);
        item.bits = static_cast<int16_t>(segment.bits);
        item.dtype = static_cast<int16_t>(segment.dtype);
        item.wire = static_cast<int16_t>(segment.wire);
        item.rounding = static_cast<int16_t>(segment.rounding);
        item.levels = static_cast<int32_t>(segment.levels);
        if (segment.bits != 0) {
            item.bucket = std::min(segment.bucket, (segment.numel + kRun - 1) / kRun * kRun);
            item.per_unit = static_cast<int32_t>(std::max<int64_t>(1, kUnit / item.bucket));
            item.unit_values = item.per_unit * item.bucket;
            item.bucket_log2 = -1;
            for (int i = 3; i < 62; ++i) {
                if (item.bucket == int64_t{1} << i) item.bucket_log2 = i;
            }
        }
        add(item);
    }

    // ``bytes`` zeros from ``byte`` on of what is written.
    void add_zeros(int64_t byte, int64_t bytes) {
        if (bytes <= 0) return;
        Item item{};
        item.kind = Kind::kZeros;
        item.unit_values = 4 * kUnit;
        item.data_byte = byte;
        item.numel = bytes;
        item.levels = -1;
        add(item);
    }

    const std::vector<Item>& all() const { return items_; }
    // Where the buckets' epochs start, by item; empty where items have none.
    const std::vector<int64_t>& epoch_bytes() const { return epoch_bytes_; }
    static int64_t num_units(const Item& item) {
        return item.numel / item.unit_values + (item.numel % item.unit_values != 0);
    }

  private:
    void add(const Item& item) { items_.push_back(item); }

    std::vector<Item> items_;
    std::vector<int64_t> epoch_bytes_;
};

// What writes every byte of a payload but the header's.
inline Items encode_items(const std::vector<Segment>& segments, int64_t payload_bytes) {
    Items items;
    for (const Segment& segment : segments) items.add_segment(segment);
    each_gap(segments, payload_bytes,
             [&](int64_t from, int64_t to) { items.add_zeros(from, to - from); });
    return items;
}

// What writes the values of the segments that have epochs, which a kernel of its own decodes.
inline Items kept_items(const std::vector<Segment>& segments) {
    Items items;
    for (const Segment& segment : segments) {
        if (segment.epoch_byte >= 0) items.add_segment(segment);
    }
    return items;
}

// What writes the values of the other segments, and the padding of all unless values are added.
inline Items decode_items(const std::vector<Segment>& segments, bool add) {
    Items items;
    for (const Segment& segment : segments) {
        if (segment.epoch_byte < 0) items.add_segment(segment);
        if (add) continue;
        const int64_t item = item_bytes(segment.dtype);
        items.add_zeros(segment.buffer_byte + segment.numel * item,
                        (segment.padded - segment.numel) * item);
    }
    return items;
}

// Everything a launch needs to know, handed over as its argument: nothing is copied to the GPU
// beforehand, and a captured graph holds its own.
struct Job {
    static constexpr int kMaxItems = 24, kMaxLevels = 448;
    const uint8_t* from;
    uint8_t* to;
    uint64_t key;
    int64_t num_units;
    int64_t header[kHeaderBytes / 8];
    int32_t num_items;
    bool has_header;
    bool add;
    Item items[kMaxItems];
    union {
        float levels[kMaxLevels];
        int64_t epoch_bytes[kMaxItems];  // of items that have epochs, and thus no levels
    };
};
static_assert(sizeof(Job) <= 4096, "more makes every launch slower");

// What a warp works on.
struct Work {
    const Item* item;
    const float* levels;
    uint64_t key;
    const uint8_t* from;
    uint8_t* to;
    bool add;
    int64_t epoch_byte;  // -1: the item's buckets have no epochs
};

// Calls ``launch(job)`` with one job, or with several where the items are too many for one.
// ``header`` may be null.
template <class Launch>
void launch_jobs(const Items& all, const float* levels, const uint8_t* from, uint8_t* to,
                 uint64_t key, const int64_t* header, bool add, const Launch& launch) {
    const std::vector<Item>& items = all.all();
    Job job;
    job.from = from, job.to = to, job.key = key, job.add = add;
    job.has_header = header != nullptr;
    if (job.has_header) std::copy(header, header + kHeaderBytes / 8, job.header);
    size_t i = 0;
    do {
        job.num_items = 0, job.num_units = 0;
        int num_levels = 0;
        for (; i < items.size() && job.num_items < Job::kMaxItems; ++i) {
            Item item = items[i];
            if (item.levels >= 0) {
                const int count = 1 << item.bits;
                if (num_levels + count > Job::kMaxLevels) break;
                std::copy(levels + item.levels, levels + item.levels + count,
                          job.levels + num_levels);
                item.levels = num_levels;
                num_levels += count;
            }
            if (!all.epoch_bytes().empty()) {
                job.epoch_bytes[job.num_items] = all.epoch_bytes()[i];
            }
            item.first_unit = job.num_units;
            job.num_units += Items::num_units(item);
            job.items[job.num_items++] = item;
        }
        launch(job);
        job.has_header = false;
    } while (i < items.size());
}

}  // namespace qsdp
