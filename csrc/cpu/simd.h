// The vector interface that the -inl.h files are compiled over: that of the instruction set which
// the .cpp file names before, or plain C++. What they define stands in a namespace of its own.
#pragma once

#if defined(QSDP_AVX512)
#define QSDP_ISA avx512
#include "cpu/simd_avx512.h"
#elif defined(QSDP_AVX2)
#define QSDP_ISA avx2
#include "cpu/simd_avx2.h"
#else
#define QSDP_ISA scalar
#include "cpu/simd_scalar.h"
#endif
