// The kernels with AVX2, where the compiler can switch it on here; else nothing.
#include "cpu_kernels.h"

#if MRCNN3D_WITH_AVX2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define MRCNN3D_KERNELS avx2_kernels
#define MRCNN3D_KERNELS_NAME "AVX2"
#define MRCNN3D_PACK_BYTES 32
#include "cpu_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MRCNN3D_WITH_AVX2
