// Which kernels this machine can run, and which of them serve.
#pragma once

#include "cpu/kernels.h"

namespace qsdp {

const Kernels& kernels_in_use();

}  // namespace qsdp

// For qsdp/ops/native.py, by ctypes.
extern "C" {
__attribute__((visibility("default"))) const char* qsdp_cpu_in_use();
// The best kernels first, comma-separated.
__attribute__((visibility("default"))) const char* qsdp_cpu_available();
// Returns 1, or 0 where ``name`` cannot run; not to be called while a kernel runs.
__attribute__((visibility("default"))) int qsdp_cpu_use(const char* name);
}
