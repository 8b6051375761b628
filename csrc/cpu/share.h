// How threads share the parts of a call, which are to be done in order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/codec_call.h"

namespace qsdp {

// Consecutive parts whose values threads may share. They fall into stacks: the parts of one write
// one row by one table, so that a range of the table's values is the same bytes in all of them, and
// the thread that takes it goes through them in order. The stacks write rows that ascend, so that
// no two write the same one. The values of all stacks are laid end to end.
class Share {
  public:
    // Takes parts from ``first`` on, as many as may be; returns the next. ``row``: which column
    // names what is written; ``values``: how many values a part has.
    size_t take(const CodecCall& call, size_t first, int64_t Part::* row,
                int64_t SegmentTable::* values) {
        const std::vector<Part>& parts = call.parts;
        parts_ = parts.data();
        stacks_.clear();
        num_values_ = 0, deepest_ = 1;
        size_t next = first;
        while (next < parts.size() && (next == first || parts[next].*row > parts[next - 1].*row)) {
            const Part& part = parts[next];
            const size_t begin = next;
            do {
                ++next;
            } while (next < parts.size() && parts[next].*row == part.*row &&
                     parts[next].table == part.table);
            num_values_ += call.tables[static_cast<size_t>(part.table)].*values;
            deepest_ = std::max(deepest_, next - begin);
            stacks_.push_back({begin, next, num_values_});
        }
        return next;
    }

    int64_t num_values() const { return num_values_; }

    // Values a thread takes at least, where ``grain`` is work enough for it.
    int64_t grain(int64_t grain) const {
        return std::max<int64_t>(1, grain / static_cast<int64_t>(deepest_));
    }

    // Calls ``code(part, from, to)`` for all that the values [begin, end) are of.
    template <class Code>
    void each(int64_t begin, int64_t end, const Code& code) const {
        const auto ends_after = [](int64_t value, const Stack& stack) { return value < stack.end; };
        auto stack = std::upper_bound(stacks_.begin(), stacks_.end(), begin, ends_after);
        int64_t start = stack == stacks_.begin() ? 0 : (stack - 1)->end;
        for (; begin < end; begin = start = stack->end, ++stack) {
            const int64_t to = std::min(end, stack->end);
            for (size_t i = stack->first; i < stack->last; ++i) {
                code(parts_[i], begin - start, to - start);
            }
        }
    }

  private:
    struct Stack {
        size_t first, last;  // parts
        int64_t end;         // of its values
    };
    const Part* parts_ = nullptr;
    std::vector<Stack> stacks_;
    int64_t num_values_ = 0;
    size_t deepest_ = 1;
};

}  // namespace qsdp
