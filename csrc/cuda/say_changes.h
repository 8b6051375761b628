// What a frame says of a bucket's codes, by a warp: a list of changes, a map of them, or all codes.
#pragma once

#include <cstdint>

#include "common/changes.h"
#include "cuda/changes_job.h"
#include "cuda/memory.h"
#include "cuda/warp.h"

namespace qsdp {

struct Said {
    int head;  // the count byte
    int64_t num_changed;
};

// How the codes of a run differ from the kept ones: a bit a code, and by how much.
struct RunDifference {
    uint32_t changed, down, by_two;  // by_two: or by more
    int32_t num_entries, most;
};

// By how much code ``place`` has changed.
QSDP_INLINE int change_of(uint64_t now, uint64_t kept, int place, int bits) {
    const uint64_t last = (1u << bits) - 1;
    return static_cast<int>(now >> place * bits & last) -
           static_cast<int>(kept >> place * bits & last);
}

QSDP_INLINE RunDifference difference(uint64_t now, uint64_t kept, int bits) {
    RunDifference found{};
    QSDP_UNROLL(8)
    for (int i = 0; i < kRun; ++i) {
        const int by = change_of(now, kept, i, bits), apart = by < 0 ? -by : by;
        found.changed |= (apart > 0 ? 1u : 0u) << i;
        found.down |= (by < 0 ? 1u : 0u) << i;
        found.by_two |= (apart > 1 ? 1u : 0u) << i;
        found.num_entries += apart;
        found.most = apart > found.most ? apart : found.most;
    }
    return found;
}

// The second part of a map, of which each lane has some bits.
struct MapBits {
    static constexpr int kWords = 2 * kMostKept / 32;
    uint32_t word[kWords];

    QSDP_MEMBER void merge(const MapBits& other) {
        QSDP_UNROLL(8)
        for (int i = 0; i < kWords; ++i) word[i] |= other.word[i];
    }
    // ``bits``, from bit ``at`` on.
    QSDP_MEMBER void put(uint64_t bits, int at) {
        bits <<= at % 32;
        QSDP_UNROLL(8)
        for (int i = 0; i < kWords; ++i) {
            if (i == at / 32) word[i] |= static_cast<uint32_t>(bits);
            if (i == at / 32 + 1) word[i] |= static_cast<uint32_t>(bits >> 32);
        }
    }
    QSDP_MEMBER uint8_t byte(int number) const {
        uint32_t own = 0;
        QSDP_UNROLL(8)
        for (int i = 0; i < kWords; ++i) own = i == number / 4 ? word[i] : own;
        return static_cast<uint8_t>(own >> number % 4 * 8);
    }
};

// ``before``: how many codes of the lanes before a lane's have changed.
QSDP_INLINE void say_map(PerLane<RunDifference>& found, PerLane<int64_t>& before, int count,
                         int room, uint8_t* to) {
    const int mask_bytes = (count + 7) / 8, how_bytes = (room + 3) / 4;
    PerLane<MapBits> how;
    each_lane([&](int lane) {
        const RunDifference& own = found[lane];
        if (lane < mask_bytes) to[lane] = static_cast<uint8_t>(own.changed);
        uint64_t bits = 0;
        int at = 0;
        for (int i = 0; i < kRun; ++i) {
            if ((own.changed >> i & 1) == 0) continue;
            bits |= uint64_t{own.down >> i & 1} << at | uint64_t{own.by_two >> i & 1} << (at + 1);
            at += 2;
        }
        how[lane] = {};
        how[lane].put(bits, 2 * static_cast<int>(before[lane]));
    });
    combine<kWarp>(how);
    each_lane([&](int lane) {
        if (lane < how_bytes) to[mask_bytes + lane] = how[lane].byte(lane);
    });
}

QSDP_INLINE void say_codes(PerLane<uint64_t>& codes, int count, int bits, uint8_t* to) {
    each_lane([&](int lane) {
        const int valid = valid_of(lane, count);
        if (valid > 0) store_codes(to, codes[lane], lane, valid, bits);
    });
}

// The shortest, of ``count`` codes that are now, and those that are kept in ``row``.
QSDP_INLINE Said say_changes(PerLane<uint64_t>& now, const uint8_t* row, int count, int bits,
                             uint8_t* to) {
    PerLane<uint64_t> kept;
    PerLane<RunDifference> found;
    PerLane<int64_t> entries, changed;
    each_lane([&](int lane) {
        const int valid = valid_of(lane, count);
        kept[lane] = valid > 0 ? load_codes(row, lane, valid, bits) : 0;
        found[lane] = difference(now[lane], kept[lane], bits);
        entries[lane] = found[lane].num_entries;
        changed[lane] = num_bits(found[lane].changed);
    });
    if (!any(changed, [](int64_t own) { return own != 0; })) return {0, 0};
    const int64_t num_changed = sum_before(changed), num_entries = sum_before(entries);
    const bool by_more = any(found, [](const RunDifference& own) { return own.most > 2; });
    const int head = shortest(num_entries, static_cast<int>(num_changed), by_more, count, bits);
    if (head == kWhole) {
        say_codes(now, count, bits, to);
    } else if (head > kMostListed) {
        say_map(found, changed, count, head - kMostListed, to);
    } else {
        each_lane([&](int lane) {
            uint8_t* own = to + entries[lane];
            for (int i = 0; i < kRun; ++i) {
                const int by = change_of(now[lane], kept[lane], i, bits);
                const int entry = lane * kRun + i + (by < 0 ? 128 : 0);
                for (int left = by < 0 ? -by : by; left > 0; --left) {
                    *own++ = static_cast<uint8_t>(entry);
                }
            }
        });
    }
    return {head, num_changed};
}

}  // namespace qsdp
