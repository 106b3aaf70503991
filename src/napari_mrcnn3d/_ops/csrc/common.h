// What every compiled kernel of an operation must agree on: where RoIAlign samples, and how suppression rounds.
// Includes nothing, so that C++ compilers, nvcc and NVRTC can all read it.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MRCNN3D_INLINE __host__ __device__ __forceinline__
#else
#define MRCNN3D_INLINE inline
#endif

// One rounding per operation: a fused multiply-add would decide ties differently on different devices.
// C++ compilers get the same through -ffp-contract=off.
#if defined(__CUDA_ARCH__)
#define MRCNN3D_MUL(a, b) __fmul_rn((a), (b))
#define MRCNN3D_ADD(a, b) __fadd_rn((a), (b))
#define MRCNN3D_SUB(a, b) __fsub_rn((a), (b))
#else
#define MRCNN3D_MUL(a, b) ((a) * (b))
#define MRCNN3D_ADD(a, b) ((a) + (b))
#define MRCNN3D_SUB(a, b) ((a) - (b))
#endif

namespace mrcnn3d {

// Volume of a box z1, y1, x1, z2, y2, x2; 0 if a side is negative, not a number if a coordinate is.
MRCNN3D_INLINE float box_volume(const float* box) {
  float sides[3];
  for (int axis = 0; axis < 3; ++axis) {
    const float side = MRCNN3D_SUB(box[axis + 3], box[axis]);
    sides[axis] = side < 0.f ? 0.f : side;
  }
  return MRCNN3D_MUL(MRCNN3D_MUL(sides[0], sides[1]), sides[2]);
}

// Whether two boxes that share these sides overlap by an IoU above the threshold; not if a volume is no number.
MRCNN3D_INLINE bool overlaps_by_more(float z, float y, float x, float volume, float other_volume, float threshold) {
  const float intersection = MRCNN3D_MUL(MRCNN3D_MUL(z, y), x);
  const float joined = MRCNN3D_SUB(MRCNN3D_ADD(volume, other_volume), intersection);
  return intersection > MRCNN3D_MUL(threshold, joined);
}

// Sample `index` of bin `bin` along one axis, in cells: `start` is the RoI's lower side minus half a cell.
template <typename T>
MRCNN3D_INLINE T sample_position(T start, T bin_size, int bin, int index, int samples) {
  return start + (T(bin) + (T(index) + T(0.5)) / T(samples)) * bin_size;
}

// The two cells between which a sample lies and their weights. A sample outside [-1, length], or at no number,
// sees nothing (false); in the outer half cell it takes the border's value.
template <typename T>
MRCNN3D_INLINE bool sample_cells(T position, int length, int& low, int& high, T& low_weight, T& high_weight) {
  if (!(position >= T(-1) && position <= T(length))) return false;
  if (position < T(0)) position = T(0);
  low = int(position);
  if (low >= length - 1) {
    low = high = length - 1;
    low_weight = T(1);
    high_weight = T(0);
    return true;
  }
  high = low + 1;
  high_weight = position - T(low);
  low_weight = T(1) - high_weight;
  return true;
}

}  // namespace mrcnn3d
