// The transpose of RoIAlign on CUDA.
//
// Gathers: the value of a cell is the sum over the bins that see it, so that a RoI adds to each of its cells once.
#pragma once
#include "cuda_roi_align.cuh"

namespace mrcnn3d {

// Where the taps of a cell lie among those of its RoI and axis.
struct List {
  int first, count;
};

// The cells that a RoI touches: [low, high) along each axis; empty where it touches none.
struct Range {
  int low[3], high[3];
};

// As PlaneTaps, from separate taps of the rows and of the places in them.
template <typename T, int V>
struct CrossTaps {
  using A = typename SumOf<T>::Type;
  const Tap<A>* rows;
  const Tap<A>* places;
  int row_count, place_count, row_step, place_step;  // steps in bytes

  MRCNN3D_DEVICE Sums<A, V> sum(const T* plane) const {
    Sums<A, V> sums;
    sums.clear();
#pragma unroll 1
    for (int j = 0; j < row_count; ++j) {
      const Tap<A> row = rows[j];
#pragma unroll 2
      for (int i = 0; i < place_count; ++i) {
        const Tap<A> place = places[i];
        const unsigned offset = row.index * row_step + place.index * place_step;
        sums.add(row.weight * place.weight, load<T, V>(plane, offset));
      }
    }
    return sums;
  }
};

// The taps of all RoIs by cell.
template <typename A>
struct CellTaps {
  Tap<A>* taps;   // [rois, 2 * samples * (bins of z, y, x)], by axis and then by cell
  List* lists;    // [rois, cells of z, y, x]
  Range* ranges;  // [rois]
};

// Sort one axis of a box from bins to cells; `places` are the lists of its bins, unused places hold no cell (-1).
template <typename A>
MRCNN3D_DEVICE void sort_axis(const Axis<A>& axis, const Tap<A>* places, Tap<A>* taps, List* lists, int& low,
                              int& high) {
  const int count = axis.bins * axis.capacity();
  for (int place = threadIdx.x; place < count; place += blockDim.x) {
    const Tap<A> tap = places[place];
    if (tap.index < 0) continue;
    int rank = 0;
    for (int other = 0; other < count; ++other) {
      const int cell = places[other].index;
      rank += cell >= 0 && (cell < tap.index || (cell == tap.index && other < place));
    }
    taps[rank] = {place / axis.capacity(), tap.weight};
    atomicMin(&low, tap.index);
    atomicMax(&high, tap.index + 1);
  }
  for (int cell = threadIdx.x; cell < axis.length; cell += blockDim.x) {
    List list = {0, 0};
    for (int other = 0; other < count; ++other) {
      const int index = places[other].index;
      list.first += index >= 0 && index < cell;
      list.count += index == cell;
    }
    lists[cell] = list;
  }
}

// Each block sorts one RoI.
template <typename A>
MRCNN3D_DEVICE void roi_align_taps(const A* boxes, const Int* batch_index, const CellTaps<A>& sorted,
                                   const Geometry<A>& geometry) {
  static __shared__ Range range;
  const auto& [rois, batch, channels, lanes, columns, z, y, x] = geometry;
  const int roi = blockIdx.x, capacity = z.capacity();
  Tap<A>* places = reinterpret_cast<Tap<A>*>(shared_memory);
  const BoxTaps<A> taps = {z, y, x, places, reinterpret_cast<int*>(places + geometry.taps())};
  taps.fill(boxes + Int(roi) * 6);
  if (threadIdx.x == 0) range = {{z.length, y.length, x.length}, {0, 0, 0}};
  __syncthreads();
  for (int place = threadIdx.x; place < geometry.taps(); place += blockDim.x) {
    if (place % capacity >= taps.counts[place / capacity]) places[place].index = -1;
  }
  __syncthreads();
  Tap<A>* out = sorted.taps + Int(roi) * geometry.taps();
  List* lists = sorted.lists + Int(roi) * (z.length + y.length + x.length);
  const int y_place = z.bins * capacity, x_place = y_place + y.bins * capacity;
  sort_axis(z, places, out, lists, range.low[0], range.high[0]);
  sort_axis(y, places + y_place, out + y_place, lists + z.length, range.low[1], range.high[1]);
  sort_axis(x, places + x_place, out + x_place, lists + z.length + y.length, range.low[2], range.high[2]);
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool present = batch_index[roi] >= 0 && batch_index[roi] < batch;
    const bool touches = range.low[0] < range.high[0] && range.low[1] < range.high[1] && range.low[2] < range.high[2];
    sorted.ranges[roi] = present && touches ? range : Range{{0, 0, 0}, {0, 0, 0}};
  }
}

// One RoI seen from the cells.
template <typename T>
struct RoICells {
  using A = typename SumOf<T>::Type;
  const T* values;
  const Tap<A>*z_taps, *y_taps, *x_taps;
  const List *z_lists, *y_lists, *x_lists;

  MRCNN3D_DEVICE RoICells(const T* all_values, const CellTaps<A>& sorted, int roi, const Geometry<A>& geometry) {
    const auto& [rois, batch, channels, lanes, columns, z, y, x] = geometry;
    values = all_values + roi * (geometry.bins() * channels);
    z_taps = sorted.taps + Int(roi) * geometry.taps();
    y_taps = z_taps + z.bins * z.capacity();
    x_taps = y_taps + y.bins * y.capacity();
    z_lists = sorted.lists + Int(roi) * (z.length + y.length + x.length);
    y_lists = z_lists + z.length;
    x_lists = y_lists + y.length;
  }

  // The bins that see the cells of this row and place.
  template <int V>
  MRCNN3D_DEVICE CrossTaps<T, V> cross(int row, int place, const Geometry<A>& geometry) const {
    const List in_y = y_lists[row], in_x = x_lists[place];
    const int step = geometry.channels * int(sizeof(T));
    return {y_taps + in_y.first, x_taps + in_x.first, in_y.count, in_x.count, geometry.x.bins * step, step};
  }
};

// A block adds the cells of one RoI (grid y), in one slice of channels (grid x), to the output with atomics.
template <typename T, int V>
MRCNN3D_DEVICE void roi_align_scatter(const T* values, const CellTaps<typename SumOf<T>::Type>& sorted,
                                      const Int* batch_index, typename SumOf<T>::Type* out,
                                      const Geometry<typename SumOf<T>::Type>& geometry) {
  using A = typename SumOf<T>::Type;
  const auto& [rois, batch, channels, lanes, columns, z, y, x] = geometry;
  const int channel = (int(blockIdx.x) * lanes + int(threadIdx.x) % lanes) * V;
  if (channel >= channels) return;
  for (int roi = blockIdx.y; roi < rois; roi += gridDim.y) {
    const Range range = sorted.ranges[roi];
    const RoICells<T> cells(values, sorted, roi, geometry);
    const int width = range.high[2] - range.low[2], count = (range.high[1] - range.low[1]) * width;
    for (int item = int(threadIdx.x) / lanes; item < count; item += columns) {
      const int row = range.low[1] + item / width, place = range.low[2] + item % width;
      const CrossTaps<T, V> seen = cells.template cross<V>(row, place, geometry);
      if (seen.row_count == 0 || seen.place_count == 0) continue;
      Column<T, V, CrossTaps<T, V>> column(cells.values + channel, geometry.template bin_plane<T>(), seen);
      A* target = out + geometry.cell(int(batch_index[roi]), range.low[0], row, place) * channels + channel;
#pragma unroll 1
      for (int plane = range.low[0]; plane < range.high[0]; ++plane) {
        const List list = cells.z_lists[plane];
        Sums<A, V> sums;
        sums.clear();
        column.add_to(sums, cells.z_taps + list.first, list.count);
        if (list.count > 0) atomic_add(target, sums);
        target += Int(y.length) * x.length * channels;
      }
    }
  }
}

// A block makes a tile of one plane of cells (grid x) in one slice of channels (grid y), RoI after RoI in their order:
// adds to the output without atomics, deterministically.
constexpr int tile_width = 8;
constexpr int gather_threads = 256;

template <typename T, int V>
MRCNN3D_DEVICE void roi_align_gather(const T* values, const CellTaps<typename SumOf<T>::Type>& sorted,
                                     const Int* batch_index, typename SumOf<T>::Type* out,
                                     const Geometry<typename SumOf<T>::Type>& geometry) {
  using A = typename SumOf<T>::Type;
  static __shared__ unsigned touching[gather_threads / 32];
  const auto& [rois, batch, channels, lanes, columns, z, y, x] = geometry;
  const int across = (x.length + tile_width - 1) / tile_width, tile_height = columns / tile_width;
  const int top = int(blockIdx.x) / across * tile_height, left = int(blockIdx.x) % across * tile_width;
  const int column_index = int(threadIdx.x) / lanes;
  const int row = top + column_index / tile_width, place = left + column_index % tile_width;
  // Slices of channels come one after the other, so that the values of one can stay in the second-level cache.
  const int planes = batch * z.length;
  for (int layer = blockIdx.y; layer < planes * geometry.slices(V); layer += gridDim.y) {
    const int entry = layer % planes / z.length, plane = layer % z.length;
    const int channel = layer / planes * lanes * V + int(threadIdx.x) % lanes * Pack<T, V>::size;
    const bool active = column_index < columns && row < y.length && place < x.length && channel < channels;
    Sums<A, V> sums;
    sums.clear();
    for (int first = 0; first < rois; first += gather_threads) {
      const int candidate = first + threadIdx.x;
      if (threadIdx.x < gather_threads / 32) touching[threadIdx.x] = 0;
      __syncthreads();
      if (candidate < rois && batch_index[candidate] == entry) {
        const Range range = sorted.ranges[candidate];
        const bool touches = range.low[0] <= plane && plane < range.high[0] && range.low[1] < top + tile_height &&
                             top < range.high[1] && range.low[2] < left + tile_width && left < range.high[2];
        if (touches) atomicOr(&touching[threadIdx.x / 32], 1u << threadIdx.x % 32);
      }
      __syncthreads();
      for (int word = 0; word < gather_threads / 32 && active; ++word) {
#pragma unroll 1
        for (unsigned open = touching[word]; open != 0; open &= open - 1) {
          const RoICells<T> cells(values, sorted, first + word * 32 + __ffs(int(open)) - 1, geometry);
          const CrossTaps<T, V> seen = cells.template cross<V>(row, place, geometry);
          if (seen.row_count == 0 || seen.place_count == 0) continue;
          const List list = cells.z_lists[plane];
          Column<T, V, CrossTaps<T, V>> column(cells.values + channel, geometry.template bin_plane<T>(), seen);
          column.add_to(sums, cells.z_taps + list.first, list.count);
        }
      }
      __syncthreads();
    }
    if (!active) continue;
    A* target = out + geometry.cell(entry, plane, row, place) * channels + channel;
    for (int v = 0; v < V; ++v) target[Pack<T, V>::channel(v)] += sums.values[v];
  }
}

}  // namespace mrcnn3d
