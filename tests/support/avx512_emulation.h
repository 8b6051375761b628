// The AVX-512 instructions that csrc/cpu/simd_avx512.h uses, written out lane by lane from Intel's
// description of each, so that its arithmetic can be tested on a machine without them. Built in
// place of the real ones by cmake -DQSDP_EMULATE_AVX512=ON.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulation {

#define EMULATED static inline __attribute__((always_inline, unused))

template <class T>
struct Lanes {
    static constexpr int kCount = 64 / sizeof(T);
    T lane[kCount];
};

template <class T, class V>
EMULATED Lanes<T> lanes(const V& vector) {
    static_assert(sizeof(V) == 64);
    Lanes<T> out;
    memcpy(&out, &vector, 64);
    return out;
}
template <class V, class T>
EMULATED V vector(const Lanes<T>& lanes) {
    V out;
    memcpy(&out, &lanes, 64);
    return out;
}
template <class T, class V, class Function>
EMULATED V map(const V& a, Function function) {
    auto x = lanes<T>(a);
    for (T& lane : x.lane) lane = function(lane);
    return vector<V>(x);
}
template <class T, class V, class Function>
EMULATED V zip(const V& a, const V& b, Function function) {
    auto x = lanes<T>(a);
    const auto y = lanes<T>(b);
    for (int i = 0; i < x.kCount; ++i) x.lane[i] = function(x.lane[i], y.lane[i]);
    return vector<V>(x);
}
template <class T, class V, class Mask>
EMULATED V blend(Mask mask, const V& a, const V& b) {
    auto x = lanes<T>(a);
    const auto y = lanes<T>(b);
    for (int i = 0; i < x.kCount; ++i) x.lane[i] = mask >> i & 1 ? y.lane[i] : x.lane[i];
    return vector<V>(x);
}
template <class T, class V>
EMULATED V splat(T value) {
    Lanes<T> x;
    for (T& lane : x.lane) lane = value;
    return vector<V>(x);
}
template <class V, class T>
EMULATED V load(const T* from) {
    V out;
    memcpy(&out, from, 64);
    return out;
}

// Two 256-bit halves through an AVX2 instruction, or two 128-bit ones that widen to it.
template <class To, class From, class Function>
EMULATED To halves(const From& from, Function function) {
    using Half = decltype(function(decltype(function.argument()){}));
    const auto* bytes = reinterpret_cast<const char*>(&from);
    decltype(function.argument()) low, high;
    memcpy(&low, bytes, sizeof low);
    memcpy(&high, bytes + sizeof low, sizeof high);
    const Half results[2] = {function(low), function(high)};
    To out;
    static_assert(sizeof results == sizeof out);
    memcpy(&out, results, sizeof out);
    return out;
}
#define EMULATED_HALVES(name, To, From, HalfFrom, expression)    \
    struct name##_half {                                         \
        static HalfFrom argument();                              \
        auto operator()(HalfFrom x) const { return expression; } \
    };                                                           \
    EMULATED To name(From a) {                                   \
        return halves<To>(a, name##_half{});                     \
    }

EMULATED_HALVES(cvtps_epi32, __m512i, __m512, __m256, _mm256_cvtps_epi32(x))
EMULATED_HALVES(cvttps_epi32, __m512i, __m512, __m256, _mm256_cvttps_epi32(x))
EMULATED_HALVES(cvtepi32_ps, __m512, __m512i, __m256i, _mm256_cvtepi32_ps(x))
EMULATED_HALVES(cvtph_ps, __m512, __m256i, __m128i, _mm256_cvtph_ps(x))
EMULATED_HALVES(cvtepu16_epi32, __m512i, __m256i, __m128i, _mm256_cvtepu16_epi32(x))
EMULATED_HALVES(nearest_ph, __m256i, __m512, __m256, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))

EMULATED __m512i cvtepu8_epi32(__m128i a) {
    uint8_t bytes[16];
    memcpy(bytes, &a, 16);
    Lanes<uint32_t> x;
    for (int i = 0; i < 16; ++i) x.lane[i] = bytes[i];
    return vector<__m512i>(x);
}
EMULATED __m512i cvtepu8_epi16(__m256i a) {
    uint8_t x[32];
    memcpy(x, &a, 32);
    Lanes<uint16_t> out;
    for (int i = 0; i < 32; ++i) out.lane[i] = x[i];
    return vector<__m512i>(out);
}
EMULATED __m256i cvtepi32_epi16(__m512i a) {
    const auto x = lanes<uint32_t>(a);
    uint16_t low[16];
    for (int i = 0; i < 16; ++i) low[i] = static_cast<uint16_t>(x.lane[i]);
    __m256i out;
    memcpy(&out, low, 32);
    return out;
}
template <class From, class To>
EMULATED __m512i narrow(__m512i a, __m512i b, int least, int most) {
    const auto x = lanes<From>(a), y = lanes<From>(b);
    Lanes<To> out;
    constexpr int kIn = 16 / sizeof(From);  // items of a 128-bit lane
    for (int i = 0; i < out.kCount; ++i) {
        const int lane = i / (2 * kIn), item = i % (2 * kIn);
        const int from = lane * kIn + item % kIn;
        const int value = item < kIn ? x.lane[from] : y.lane[from];
        out.lane[i] = static_cast<To>(value < least ? least : value > most ? most : value);
    }
    return vector<__m512i>(out);
}
EMULATED __m512i packs_epi32(__m512i a, __m512i b) {
    return narrow<int32_t, int16_t>(a, b, -32768, 32767);
}
EMULATED __m512i packus_epi16(__m512i a, __m512i b) {
    return narrow<int16_t, uint8_t>(a, b, 0, 255);
}
EMULATED __m512i permutexvar_epi32(__m512i index, __m512i a) {
    const auto from = lanes<uint32_t>(a);
    return map<uint32_t>(index, [&](uint32_t i) { return from.lane[i % 16]; });
}
EMULATED __m512 permutexvar_ps(__m512i index, __m512 a) {
    return reinterpret_cast<__m512>(permutexvar_epi32(index, reinterpret_cast<__m512i>(a)));
}
EMULATED __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    const auto low = lanes<float>(a), high = lanes<float>(b);
    const auto from = lanes<uint32_t>(index);
    Lanes<float> out;
    for (int i = 0; i < 16; ++i) {
        out.lane[i] = (from.lane[i] & 16 ? high : low).lane[from.lane[i] % 16];
    }
    return vector<__m512>(out);
}
EMULATED uint16_t test_epi32(__m512i a, __m512i b) {
    const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint32_t{(x.lane[i] & y.lane[i]) != 0} << i;
    return static_cast<uint16_t>(mask);
}
EMULATED uint64_t cmpneq_epu8(__m512i a, __m512i b) {
    const auto x = lanes<uint8_t>(a), y = lanes<uint8_t>(b);
    uint64_t mask = 0;
    for (int i = 0; i < 64; ++i) mask |= uint64_t{x.lane[i] != y.lane[i]} << i;
    return mask;
}
EMULATED __m512i unpack(__m512i a, __m512i b, int odd) {
    const auto x = lanes<uint64_t>(a), y = lanes<uint64_t>(b);
    Lanes<uint64_t> out;
    for (int i = 0; i < 8; ++i) out.lane[i] = (i % 2 ? y : x).lane[i / 2 * 2 + odd];
    return vector<__m512i>(out);
}
EMULATED __m512i unpacklo_epi64(__m512i a, __m512i b) {
    return unpack(a, b, 0);
}
EMULATED __m512i unpackhi_epi64(__m512i a, __m512i b) {
    return unpack(a, b, 1);
}
EMULATED __m256i half(__m512i a, int which) {
    __m256i out;
    memcpy(&out, reinterpret_cast<const char*>(&a) + 32 * which, 32);
    return out;
}
EMULATED uint16_t compare(__m512 a, __m512 b, int predicate) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) {
        const float p = x.lane[i], q = y.lane[i];
        const bool holds = predicate == _CMP_EQ_OQ   ? p == q
                           : predicate == _CMP_LE_OQ ? p <= q
                           : predicate == _CMP_LT_OQ ? p < q
                                                     : p != p || q != q;
        mask |= uint32_t{holds} << i;
    }
    return static_cast<uint16_t>(mask);
}
template <class T, class V, class Function>
EMULATED T reduce(const V& a, Function function) {
    const auto x = lanes<T>(a);
    T out = x.lane[0];
    for (const T lane : x.lane) out = function(out, lane);
    return out;
}
template <class T>
EMULATED __m512i shift_left(__m512i a, int n) {
    return map<T>(a, [n](T x) { return static_cast<T>(x << n); });
}
template <class T>
EMULATED __m512i shift_right(__m512i a, int n) {
    return map<T>(a, [n](T x) { return static_cast<T>(x >> n); });
}
template <int Truth>
EMULATED __m512i xor_of_three(__m512i a, __m512i b, __m512i c) {
    static_assert(Truth == 0x96, "of all ternary functions only this one is used");
    const auto differ = [](uint64_t x, uint64_t y) { return x ^ y; };
    return zip<uint64_t>(zip<uint64_t>(a, b, differ), c, differ);
}
template <class... Lane>
EMULATED __m512i setr(Lane... values) {
    using T = std::conditional_t<sizeof...(Lane) == 16, int32_t, int64_t>;
    return vector<__m512i>(Lanes<T>{{static_cast<T>(values)...}});
}

// x86's min and max return their second argument where either is NaN.
constexpr auto least = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto most = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto difference = [](float a, float b) { return a - b; };
constexpr auto excess = [](uint8_t a, uint8_t b) -> uint8_t { return a > b ? a - b : 0; };
constexpr auto full_sum = [](uint8_t a, uint8_t b) -> uint8_t {
    return a + b < 255 ? static_cast<uint8_t>(a + b) : 255;
};
constexpr auto product = [](float a, float b) { return a * b; };
constexpr auto both = [](uint64_t a, uint64_t b) { return a & b; };
constexpr auto differing = [](uint64_t a, uint64_t b) { return a ^ b; };
constexpr auto either = [](uint64_t a, uint64_t b) { return a | b; };
constexpr auto low_product = [](uint64_t a, uint64_t b) { return (a & ~0u) * (b & ~0u); };
constexpr auto sum = [](auto a, auto b) { return static_cast<decltype(a)>(a + b); };

EMULATED __m512i mask_add_epi32(__m512i from, uint16_t mask, __m512i a, __m512i b) {
    return blend<uint32_t>(mask, from, zip<uint32_t>(a, b, sum));
}

}  // namespace emulation

// clang-format off
#define _mm512_cvtps_epi32 emulation::cvtps_epi32
#define _mm512_cvttps_epi32 emulation::cvttps_epi32
#define _mm512_cvtepi32_ps emulation::cvtepi32_ps
#define _mm512_cvtph_ps emulation::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, nearest) emulation::nearest_ph(a)
#define _mm512_cvtepu16_epi32 emulation::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulation::cvtepu8_epi32
#define _mm512_cvtepu8_epi16 emulation::cvtepu8_epi16
#define _mm512_cvtepi32_epi16 emulation::cvtepi32_epi16
#define _mm512_packs_epi32 emulation::packs_epi32
#define _mm512_packus_epi16 emulation::packus_epi16
#define _mm512_permutexvar_epi32 emulation::permutexvar_epi32
#define _mm512_unpacklo_epi64 emulation::unpacklo_epi64
#define _mm512_unpackhi_epi64 emulation::unpackhi_epi64
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulation::half
#define _mm512_castsi512_si256(a) emulation::half(a, 0)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulation::compare
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulation::setr
#undef _mm512_setr_epi64
#define _mm512_setr_epi64 emulation::setr
#define _mm512_setzero_ps() emulation::splat<float, __m512>(0.0f)
#define _mm512_set1_ps emulation::splat<float, __m512>
#define _mm512_set1_epi8 emulation::splat<char, __m512i>
#define _mm512_set1_epi32 emulation::splat<int, __m512i>
#define _mm512_set1_epi64 emulation::splat<long long, __m512i>
#define _mm512_castsi512_ps(a) reinterpret_cast<__m512>(a)
#define _mm512_castps_si512(a) reinterpret_cast<__m512i>(a)
#define _mm512_loadu_si512 emulation::load<__m512i>
#define _mm512_storeu_si512(to, a) memcpy(to, &static_cast<const __m512i&>(a), 64)
#define _mm512_add_ps(a, b) emulation::zip<float>(a, b, emulation::sum)
#define _mm512_sub_ps(a, b) emulation::zip<float>(a, b, emulation::difference)
#define _mm512_mul_ps(a, b) emulation::zip<float>(a, b, emulation::product)
#define _mm512_min_ps(a, b) emulation::zip<float>(a, b, emulation::least)
#define _mm512_max_ps(a, b) emulation::zip<float>(a, b, emulation::most)
#define _mm512_min_epu32(a, b) emulation::zip<uint32_t>(a, b, emulation::least)
#define _mm512_max_epu32(a, b) emulation::zip<uint32_t>(a, b, emulation::most)
#define _mm512_adds_epu8(a, b) emulation::zip<uint8_t>(a, b, emulation::full_sum)
#define _mm512_subs_epu8(a, b) emulation::zip<uint8_t>(a, b, emulation::excess)
#undef _mm512_cmpneq_epu8_mask
#define _mm512_cmpneq_epu8_mask emulation::cmpneq_epu8
#define _mm512_min_epu8(a, b) emulation::zip<uint8_t>(a, b, emulation::least)
#define _mm512_add_epi32(a, b) emulation::zip<uint32_t>(a, b, emulation::sum)
#define _mm512_add_epi64(a, b) emulation::zip<uint64_t>(a, b, emulation::sum)
#define _mm512_and_si512(a, b) emulation::zip<uint64_t>(a, b, emulation::both)
#define _mm512_xor_si512(a, b) emulation::zip<uint64_t>(a, b, emulation::differing)
#define _mm512_or_si512(a, b) emulation::zip<uint64_t>(a, b, emulation::either)
#define _mm512_mul_epu32(a, b) emulation::zip<uint64_t>(a, b, emulation::low_product)
#define _mm512_slli_epi16(a, n) emulation::shift_left<uint16_t>(a, n)
#define _mm512_slli_epi32(a, n) emulation::shift_left<uint32_t>(a, n)
#define _mm512_srli_epi32(a, n) emulation::shift_right<uint32_t>(a, n)
#undef _mm512_slli_epi64
#define _mm512_slli_epi64(a, n) emulation::shift_left<uint64_t>(a, n)
#define _mm512_srli_epi64(a, n) emulation::shift_right<uint64_t>(a, n)
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi64(a, b, c, truth) emulation::xor_of_three<truth>(a, b, c)
#define _mm512_permutexvar_ps emulation::permutexvar_ps
#define _mm512_permutex2var_ps emulation::permutex2var_ps
#define _mm512_test_epi32_mask emulation::test_epi32
#define _mm512_mask_add_epi32 emulation::mask_add_epi32
#define _mm512_mask_blend_ps emulation::blend<float>
#define _mm512_mask_blend_epi32 emulation::blend<uint32_t>
#define _mm512_mask_blend_epi8 emulation::blend<uint8_t>
#define _mm512_reduce_min_ps(a) emulation::reduce<float>(a, emulation::least)
#define _mm512_reduce_max_ps(a) emulation::reduce<float>(a, emulation::most)
#define _mm512_reduce_min_epu32(a) emulation::reduce<uint32_t>(a, emulation::least)
#define _mm512_reduce_max_epu32(a) emulation::reduce<uint32_t>(a, emulation::most)
// clang-format on
