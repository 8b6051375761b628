// How the checks of arguments refuse: by one sentence.
#pragma once

#include <concepts>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace qsdp {

// Not by a stream: where the linker finds a static libstdc++ alone, a second set of locales is one
// too many.
inline std::string text(const std::string& part) {
    return part;
}
template <class Number>
    requires std::integral<Number> || std::floating_point<Number>
inline std::string text(Number part) {
    return std::to_string(part);
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    throw std::invalid_argument((std::string() + ... + text(parts)));
}

// Whether [start, start + count * size) lies in [lowest, limit); nothing here can overflow.
inline bool inside(int64_t start, int64_t count, int64_t size, int64_t lowest, int64_t limit) {
    return start >= lowest && start <= limit && count <= (limit - start) / size;
}

}  // namespace qsdp
