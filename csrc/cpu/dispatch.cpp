#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>
#include <string>

namespace qsdp {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool runs;
};

// Best first. The supports test also asks whether the system saves the wide registers.
#if defined(__x86_64__)
const bool kHasAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("f16c");
#if defined(QSDP_EMULATE_AVX512)
const bool kHasAvx512 = kHasAvx2;
#else
const bool kHasAvx512 = kHasAvx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
#endif
const Candidate kCandidates[] = {
    {&kAvx512Kernels, kHasAvx512}, {&kAvx2Kernels, kHasAvx2}, {&kScalarKernels, true}};
#else
const Candidate kCandidates[] = {{&kScalarKernels, true}};
#endif

const Kernels* best_kernels() {
    for (const Candidate& candidate : kCandidates) {
        if (candidate.runs) return candidate.kernels;
    }
    return &kScalarKernels;
}

// The kernels called ``name`` ("scalar", "avx2", "avx512"), or null where they cannot run.
const Kernels* find_kernels(const char* name) {
    for (const Candidate& candidate : kCandidates) {
        if (candidate.runs && std::strcmp(candidate.kernels->name, name) == 0) {
            return candidate.kernels;
        }
    }
    return nullptr;
}

std::atomic<const Kernels*> in_use{best_kernels()};

}  // namespace

const Kernels& kernels_in_use() {
    return *in_use.load(std::memory_order_relaxed);
}

}  // namespace qsdp

extern "C" {

const char* qsdp_cpu_in_use() {
    return qsdp::kernels_in_use().name;
}

const char* qsdp_cpu_available() {
    static const std::string names = [] {
        std::string joined;
        for (const auto& candidate : qsdp::kCandidates) {
            if (!candidate.runs) continue;
            if (!joined.empty()) joined += ',';
            joined += candidate.kernels->name;
        }
        return joined;
    }();
    return names.c_str();
}

int qsdp_cpu_use(const char* name) {
    const qsdp::Kernels* kernels = qsdp::find_kernels(name);
    if (kernels == nullptr) return 0;
    qsdp::in_use.store(kernels, std::memory_order_relaxed);
    return 1;
}
}
