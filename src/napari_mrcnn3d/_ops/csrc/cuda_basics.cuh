// What the CUDA kernels have in common: numbers of half precision, the channels of one thread, sums over them.
#pragma once
#include "common.h"

#define MRCNN3D_DEVICE __device__ __forceinline__

namespace mrcnn3d {

using Int = long long;
using Bits = unsigned long long;

struct Float16 {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)  // the emulation has its own
MRCNN3D_DEVICE float float_of_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
MRCNN3D_DEVICE unsigned short half_of_float(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

// Sums are float, of doubles double.
template <typename T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};

MRCNN3D_DEVICE float widen(float value) { return value; }
MRCNN3D_DEVICE double widen(double value) { return value; }
MRCNN3D_DEVICE float widen(Float16 value) { return float_of_half(value.bits); }
MRCNN3D_DEVICE float widen(BFloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }

MRCNN3D_DEVICE void narrow(float value, float& out) { out = value; }
MRCNN3D_DEVICE void narrow(double value, double& out) { out = value; }
MRCNN3D_DEVICE void narrow(float value, Float16& out) { out.bits = half_of_float(value); }
MRCNN3D_DEVICE void narrow(float value, BFloat16& out) {
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out.bits = static_cast<unsigned short>(value != value ? 0x7fc0u : rounded);
}

// The V channels of one thread: packs of at most 16 bytes, which it reads and writes in one go. Further packs lie one
// line of the cache further on, so that the threads beside each other still share their lines.
constexpr int line_bytes = 128;

template <typename T, int V>
struct Pack {
  static constexpr int size = V * sizeof(T) > 16 ? 16 / int(sizeof(T)) : V, count = V / size;
  struct alignas(sizeof(T) * size) One {
    T values[size];
  };
  One packs[count];

  // Which channel from the thread's first one on.
  static MRCNN3D_DEVICE int channel(int v) { return v / size * (line_bytes / int(sizeof(T))) + v % size; }
  MRCNN3D_DEVICE T& operator[](int v) { return packs[v / size].values[v % size]; }
  MRCNN3D_DEVICE const T& operator[](int v) const { return packs[v / size].values[v % size]; }
};

template <typename A, int V>
struct Sums {
  A values[V];

  MRCNN3D_DEVICE void clear() {
    for (int v = 0; v < V; ++v) values[v] = A(0);
  }
  template <typename T>
  MRCNN3D_DEVICE void add(A weight, const Pack<T, V>& pack) {
    for (int v = 0; v < V; ++v) values[v] = fma(weight, A(widen(pack[v])), values[v]);
  }
  // Element by element: choosing between the structures would put them into memory.
  MRCNN3D_DEVICE void add_one_of(A weight, bool former, const Sums& a, const Sums& b) {
    for (int v = 0; v < V; ++v) values[v] = fma(weight, former ? a.values[v] : b.values[v], values[v]);
  }
};

// Addresses within a plane are a pointer and a 32-bit offset in bytes: two instructions; an index costs up to six.
template <typename T>
MRCNN3D_DEVICE const T* shifted(const T* base, Bits bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + bytes);
}
template <typename T, int V>
MRCNN3D_DEVICE Pack<T, V> load(const T* base, unsigned offset) {
  const T* first = shifted(base, offset);
  Pack<T, V> pack;
  for (int p = 0; p < pack.count; ++p) {
    pack.packs[p] = *reinterpret_cast<const typename Pack<T, V>::One*>(shifted(first, p * line_bytes));
  }
  return pack;
}

// Write once, read by a later kernel: marked to leave the caches first, so that the features can stay in them.
template <typename T, int V>
MRCNN3D_DEVICE void store(T* address, const Pack<T, V>& pack) {
  for (int p = 0; p < pack.count; ++p) {
    T* target = address + pack.channel(p * pack.size);
    if constexpr (sizeof(pack.packs[0]) == 16) {
      __stcs(reinterpret_cast<float4*>(target), *reinterpret_cast<const float4*>(&pack.packs[p]));
    } else {
      *reinterpret_cast<typename Pack<T, V>::One*>(target) = pack.packs[p];
    }
  }
}

MRCNN3D_DEVICE void atomic_add(double* address, const Sums<double, 1>& sums) { atomicAdd(address, sums.values[0]); }
MRCNN3D_DEVICE void atomic_add(float* address, const Sums<float, 1>& sums) { atomicAdd(address, sums.values[0]); }
MRCNN3D_DEVICE void atomic_add(float* address, const Sums<float, 4>& sums) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const float* v = sums.values;
  atomicAdd(reinterpret_cast<float4*>(address), make_float4(v[0], v[1], v[2], v[3]));
#else
  for (int v = 0; v < 4; ++v) atomicAdd(address + v, sums.values[v]);
#endif
}

extern __shared__ double shared_memory[];

}  // namespace mrcnn3d
