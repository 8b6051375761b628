// Which item of a job a unit belongs to.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace qsdp {

// The number of the item that ``unit`` is of: ``count`` items lie in the order of their units.
template <class I, class Count>
QSDP_INLINE Count find_item(const I* items, Count count, int64_t unit) {
    Count low = 0, high = count;  // items [low, high) may hold it
    while (high - low > 1) {
        const Count middle = (low + high) / 2;
        (items[middle].first_unit <= unit ? low : high) = middle;
    }
    return low;
}

}  // namespace qsdp
