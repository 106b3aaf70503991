// Enough of CUDA for g++ to compile the kernels' own text and run it on a processor, block after block.
//
// The threads of a block take turns on one core: each runs until the next barrier, in an order that changes from
// barrier to barrier, so that a missing barrier shows. Shared memory starts as rubbish and is guarded at its end.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__  // arrays of a kernel are `static __shared__`, the dynamic one is an `extern` of namespace mrcnn3d

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

// Barriers: wait until all of this thread's group (the block, or its warp) are here, and learn what they said.
std::uint64_t meet_block(bool said);
std::uint64_t meet_warp(bool said);

inline void __syncthreads() { meet_block(false); }
inline int __syncthreads_and(int said) { return meet_block(!said) == 0; }
inline unsigned __ballot_sync(unsigned, bool said) { return unsigned(meet_warp(said)); }

struct alignas(16) float4 {
  float x, y, z, w;
};
inline void __stcs(float4* address, float4 value) { *address = value; }

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
inline void atomicMin(int* address, int value) { *address = value < *address ? value : *address; }
inline void atomicMax(int* address, int value) { *address = value > *address ? value : *address; }
template <typename T>
void atomicOr(T* address, T value) {
  *address |= value;
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace mrcnn3d {
// In this namespace, where the C library's do not compete. One rounding more than on a card, which no test may notice.
inline float fma(float a, float b, float c) { return a * b + c; }
inline double fma(double a, double b, double c) { return a * b + c; }
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline double fmin(double a, double b) { return __builtin_fmin(a, b); }
inline double fmax(double a, double b) { return __builtin_fmax(a, b); }
inline double ceil(double value) { return __builtin_ceil(value); }

inline float float_of_half(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return float(value);
}
inline unsigned short half_of_float(float value) {
  const _Float16 half = _Float16(value);
  unsigned short bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
}  // namespace mrcnn3d
