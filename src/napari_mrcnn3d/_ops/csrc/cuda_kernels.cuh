// The CUDA kernels, as they are launched. Includes files beside it and these nothing else, so that NVRTC, nvcc and,
// after tests/ops/emulation/cuda.h, a C++ compiler can read the same text. Compile without contraction (-fmad=false):
// where RoIAlign samples and what suppresses what must not depend on the device; sums use explicit fused multiply-adds.
//
// Parameters of kernels are pointers, 64-bit integers and doubles only, all of eight bytes, so that a caller cannot get
// a width wrong. Volumes are channels last. Where there can be more work than blocks, kernels stride over the grid.
#pragma once
#include "cuda_nms.cuh"
#include "cuda_paste_masks.cuh"
#include "cuda_roi_align_transposed.cuh"

#define MRCNN3D_KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name

#define MRCNN3D_GEOMETRY                                                                                  \
  mrcnn3d::Int rois, mrcnn3d::Int batch, mrcnn3d::Int channels, mrcnn3d::Int lanes, mrcnn3d::Int columns, \
      mrcnn3d::Int bins_z, mrcnn3d::Int depth, double scale_z, mrcnn3d::Int bins_y, mrcnn3d::Int height,  \
      double scale_y, mrcnn3d::Int bins_x, mrcnn3d::Int width, double scale_x, mrcnn3d::Int samples
#define MRCNN3D_GEOMETRY_OF(A)                                                                                     \
  mrcnn3d::Geometry<A> {                                                                                           \
    int(rois), int(batch), int(channels), int(lanes), int(columns),                                                \
        {int(bins_z), int(depth), int(samples), A(scale_z)}, {int(bins_y), int(height), int(samples), A(scale_y)}, \
        {int(bins_x), int(width), int(samples), A(scale_x)},                                                       \
  }

#define MRCNN3D_ROI_ALIGN(name, T, A, V)                                                           \
  MRCNN3D_KERNEL(roi_align_##name, 416, 2)                                                         \
  (const T* features, const A* boxes, const mrcnn3d::Int* batch_index, T* out, MRCNN3D_GEOMETRY) { \
    mrcnn3d::roi_align<T, V>(features, boxes, batch_index, out, MRCNN3D_GEOMETRY_OF(A));           \
  }
#define MRCNN3D_TAPS(name, A)                                                                      \
  MRCNN3D_KERNEL(roi_align_taps_##name, 256, 1)                                                    \
  (const A* boxes, const mrcnn3d::Int* batch_index, mrcnn3d::Tap<A>* taps, mrcnn3d::List* lists,   \
   mrcnn3d::Range* ranges, MRCNN3D_GEOMETRY) {                                                     \
    mrcnn3d::roi_align_taps<A>(boxes, batch_index, {taps, lists, ranges}, MRCNN3D_GEOMETRY_OF(A)); \
  }
#define MRCNN3D_SCATTER(name, T, A, V)                                                                         \
  MRCNN3D_KERNEL(roi_align_scatter_##name, 256, 4)                                                             \
  (const T* values, mrcnn3d::Tap<A>* taps, mrcnn3d::List* lists, mrcnn3d::Range* ranges,                       \
   const mrcnn3d::Int* batch_index, A* out, MRCNN3D_GEOMETRY) {                                                \
    mrcnn3d::roi_align_scatter<T, V>(values, {taps, lists, ranges}, batch_index, out, MRCNN3D_GEOMETRY_OF(A)); \
  }
#define MRCNN3D_GATHER(name, T, A, V)                                                                         \
  MRCNN3D_KERNEL(roi_align_gather_##name, mrcnn3d::gather_threads, 3)                                         \
  (const T* values, mrcnn3d::Tap<A>* taps, mrcnn3d::List* lists, mrcnn3d::Range* ranges,                      \
   const mrcnn3d::Int* batch_index, A* out, MRCNN3D_GEOMETRY) {                                               \
    mrcnn3d::roi_align_gather<T, V>(values, {taps, lists, ranges}, batch_index, out, MRCNN3D_GEOMETRY_OF(A)); \
  }
#define MRCNN3D_PASTE(name, A)                                                                                      \
  MRCNN3D_KERNEL(paste_ranks_##name, 256, 3)                                                                        \
  (const A* masks, const double* boxes, int* ranks, mrcnn3d::Int count, mrcnn3d::Int cells_z, mrcnn3d::Int cells_y, \
   mrcnn3d::Int cells_x, mrcnn3d::Int depth, mrcnn3d::Int height, mrcnn3d::Int width, double threshold) {           \
    const int cells[3] = {int(cells_z), int(cells_y), int(cells_x)};                                                \
    const int extent[3] = {int(depth), int(height), int(width)};                                                    \
    mrcnn3d::paste_ranks<A>(masks, boxes, ranks, int(count), cells, extent, A(threshold));                          \
  }

// Wide kernels move 16 bytes at a time, the widest twice that; scatter adds four floats, for which halves load eight
// bytes.
MRCNN3D_ROI_ALIGN(float32, float, float, 1)
MRCNN3D_ROI_ALIGN(float32_wide, float, float, 4)
MRCNN3D_ROI_ALIGN(float32_widest, float, float, 8)
MRCNN3D_ROI_ALIGN(float64, double, double, 1)
MRCNN3D_ROI_ALIGN(float16, mrcnn3d::Float16, float, 1)
MRCNN3D_ROI_ALIGN(float16_wide, mrcnn3d::Float16, float, 8)
MRCNN3D_ROI_ALIGN(bfloat16, mrcnn3d::BFloat16, float, 1)
MRCNN3D_ROI_ALIGN(bfloat16_wide, mrcnn3d::BFloat16, float, 8)

MRCNN3D_TAPS(float32, float)
MRCNN3D_TAPS(float64, double)

MRCNN3D_SCATTER(float32, float, float, 1)
MRCNN3D_SCATTER(float32_wide, float, float, 4)
MRCNN3D_SCATTER(float64, double, double, 1)
MRCNN3D_SCATTER(float16, mrcnn3d::Float16, float, 1)
MRCNN3D_SCATTER(float16_wide, mrcnn3d::Float16, float, 4)
MRCNN3D_SCATTER(bfloat16, mrcnn3d::BFloat16, float, 1)
MRCNN3D_SCATTER(bfloat16_wide, mrcnn3d::BFloat16, float, 4)

MRCNN3D_GATHER(float32, float, float, 1)
MRCNN3D_GATHER(float32_wide, float, float, 4)
MRCNN3D_GATHER(float32_widest, float, float, 8)
MRCNN3D_GATHER(float64, double, double, 1)
MRCNN3D_GATHER(float16, mrcnn3d::Float16, float, 1)
MRCNN3D_GATHER(float16_wide, mrcnn3d::Float16, float, 8)
MRCNN3D_GATHER(bfloat16, mrcnn3d::BFloat16, float, 1)
MRCNN3D_GATHER(bfloat16_wide, mrcnn3d::BFloat16, float, 8)

MRCNN3D_KERNEL(nms_drop, mrcnn3d::word_bits, 16)
(const float* boxes, const mrcnn3d::Int* groups, mrcnn3d::Int begin, mrcnn3d::Int size, double threshold,
 const mrcnn3d::Int* kept, const mrcnn3d::Int* kept_count, mrcnn3d::Int limit, mrcnn3d::Bits* removed) {
  mrcnn3d::nms_drop({boxes, groups, begin, int(size), float(threshold)}, kept, kept_count, limit, removed);
}

MRCNN3D_KERNEL(nms_compare, mrcnn3d::word_bits, 16)
(const float* boxes, const mrcnn3d::Int* groups, mrcnn3d::Int begin, mrcnn3d::Int size, double threshold,
 const mrcnn3d::Int* kept_count, mrcnn3d::Int limit, mrcnn3d::Bits* matrix) {
  mrcnn3d::nms_compare({boxes, groups, begin, int(size), float(threshold)}, kept_count, limit, matrix);
}

MRCNN3D_KERNEL(nms_keep, mrcnn3d::keep_threads, 1)
(mrcnn3d::Int begin, mrcnn3d::Int size, const mrcnn3d::Bits* matrix, const mrcnn3d::Bits* dropped, mrcnn3d::Int limit,
 mrcnn3d::Int* kept, mrcnn3d::Int* kept_count) {
  mrcnn3d::nms_keep({nullptr, nullptr, begin, int(size), 0.f}, matrix, dropped, limit, kept, kept_count);
}

MRCNN3D_PASTE(float32, float)
MRCNN3D_PASTE(float64, double)

MRCNN3D_KERNEL(paste_labels, 256, 1)
(int* voxels, const int* labels, mrcnn3d::Int count, mrcnn3d::Int size) {
  mrcnn3d::paste_labels(voxels, labels, count, size);
}
