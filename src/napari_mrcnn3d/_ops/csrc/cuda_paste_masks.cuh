// Masks into one label volume on CUDA: first the rank of the best mask that claims a voxel, then its label.
#pragma once
#include "cuda_basics.cuh"

namespace mrcnn3d {

// Voxels of one axis that a box covers, [first, stop); without voxels where its sides are not finite.
struct Span {
  double low, size;
  int first, stop;

  MRCNN3D_DEVICE Span(double from, double to, int length) : low(from), size(to - from), first(0), stop(0) {
    if (!(from - from == 0.0 && to - to == 0.0)) return;  // not finite
    // Bounded before they become integers: a box may lie anywhere.
    first = int(fmin(fmax(ceil(from - 0.5), 0.0), double(length)));
    stop = int(fmax(fmin(ceil(to - 0.5), double(length)), double(first)));
  }
  MRCNN3D_DEVICE int count() const { return stop - first; }
};

// Where a voxel's centre lies between two cells of a mask.
template <typename A>
struct Between {
  int low, high;
  A low_weight, high_weight;

  MRCNN3D_DEVICE void set(const Span& span, int voxel, int cells) {
    const double centre = double(voxel) + 0.5;
    const double position = fmin(fmax((centre - span.low) / span.size * cells - 0.5, 0.0), double(cells - 1));
    low = int(position);
    high = min(low + 1, cells - 1);
    low_weight = A(1.0 - (position - low));
    high_weight = A(position - low);
  }
};

// A mask value; what is no number counts as 0.
template <typename A>
MRCNN3D_DEVICE A probability(const A* address) {
  const A value = *address;
  return value == value ? value : A(0);
}

constexpr int tile_x = 32, tile_y = 8, tile_z = 4;  // voxels; a thread for each of x and y

// Paints tiles of one mask's box (grid y; grid x shares the tiles): the rank of the best mask that claims a voxel.
template <typename A>
MRCNN3D_DEVICE void paste_ranks(const A* masks, const double* boxes, int* ranks, int count, const int cells[3],
                                const int extent[3], A threshold) {
  static __shared__ Between<A> z_between[tile_z], y_between[tile_y], x_between[tile_x];
  const int thread = threadIdx.x;
  for (int rank = blockIdx.y; rank < count; rank += gridDim.y) {
    const double* box = boxes + Int(rank) * 6;
    const Span z(box[0], box[3], extent[0]), y(box[1], box[4], extent[1]), x(box[2], box[5], extent[2]);
    const A* mask = masks + Int(rank) * cells[0] * cells[1] * cells[2];
    const int across = (x.count() + tile_x - 1) / tile_x, down = (y.count() + tile_y - 1) / tile_y;
    const int deep = (z.count() + tile_z - 1) / tile_z;
    for (Int tile = blockIdx.x; tile < Int(deep) * down * across; tile += gridDim.x) {
      const int front = z.first + int(tile / across / down) * tile_z;
      const int top = y.first + int(tile / across % down) * tile_y, left = x.first + int(tile % across) * tile_x;
      if (thread < tile_x) {
        x_between[thread].set(x, left + thread, cells[2]);
      } else if (thread < tile_x + tile_y) {
        y_between[thread - tile_x].set(y, top + thread - tile_x, cells[1]);
      } else if (thread < tile_x + tile_y + tile_z) {
        z_between[thread - tile_x - tile_y].set(z, front + thread - tile_x - tile_y, cells[0]);
      }
      __syncthreads();
      const int row = top + thread / tile_x, column = left + thread % tile_x;
      const Between<A> in_y = y_between[thread / tile_x], in_x = x_between[thread % tile_x];
#pragma unroll 1
      for (int k = 0; k < tile_z && front + k < z.stop && row < y.stop && column < x.stop; ++k) {
        int* voxel = ranks + (Int(front + k) * extent[1] + row) * extent[2] + column;
        if (*voxel <= rank) continue;  // a better mask has it; ranks only ever fall
        const Between<A> in_z = z_between[k];
        const auto along_x = [&](int plane, int line) {
          const A* cell = mask + (Int(plane) * cells[1] + line) * cells[2];
          return fma(in_x.high_weight, probability(cell + in_x.high), in_x.low_weight * probability(cell + in_x.low));
        };
        const auto along_y = [&](int plane) {
          return fma(in_y.high_weight, along_x(plane, in_y.high), in_y.low_weight * along_x(plane, in_y.low));
        };
        const A value = fma(in_z.high_weight, along_y(in_z.high), in_z.low_weight * along_y(in_z.low));
        if (value >= threshold) atomicMin(voxel, rank);
      }
      __syncthreads();  // the next tile's weights take the place of these
    }
  }
}

// Ranks become labels, in place; `count` and above is no mask.
MRCNN3D_DEVICE void paste_labels(int* voxels, const int* labels, Int count, Int size) {
  for (Int i = Int(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += Int(gridDim.x) * blockDim.x) {
    const int rank = voxels[i];
    voxels[i] = rank < count ? labels[rank] : 0;
  }
}

}  // namespace mrcnn3d
