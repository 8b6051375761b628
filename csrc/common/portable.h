// What lets one text serve host and device, and several instruction sets in one library.
#pragma once

// Internal linkage, always: were these functions shared between translation units, the linker could
// keep the AVX-512 copy for everyone, and a machine without it would stop at an illegal
// instruction.
#if defined(__CUDACC__)
#define QSDP_INLINE static __host__ __device__ __forceinline__
#define QSDP_MEMBER __host__ __device__ __forceinline__
#else
#define QSDP_INLINE static inline __attribute__((always_inline, unused))
#define QSDP_MEMBER inline __attribute__((always_inline))
#endif

// Before a loop, whose variables then stay in registers.
#if defined(__CUDA_ARCH__)
#define QSDP_PRAGMA(text) _Pragma(#text)
#define QSDP_UNROLL(times) QSDP_PRAGMA(unroll times)
#else
#define QSDP_UNROLL(times)
#endif
