// RoIAlign on CUDA.
//
// The mean of trilinear samples over a bin is a weighted sum over cells, whose weights are products of one weight per
// axis. So per axis a bin is a list of taps (cell and weight), merged where samples share a cell: eight samples per
// bin then cost far less than eight times one. The transpose reads the same lists by cell instead of by bin.
#pragma once
#include "cuda_basics.cuh"

namespace mrcnn3d {

template <typename A>
struct Tap {
  int index;  // of the cell (or, in the transpose, the bin) at the other end
  A weight;
};

template <typename A>
struct Axis {
  int bins, length, samples;
  A scale;

  MRCNN3D_DEVICE int capacity() const { return 2 * samples; }  // taps of a bin
};

// Taps of one bin along one axis of a box; how many there are.
template <typename A>
MRCNN3D_DEVICE int bin_taps(const Axis<A>& axis, A low, A high, int bin, Tap<A>* taps) {
  const A start = low * axis.scale - A(0.5);
  const A bin_size = (high * axis.scale - A(0.5) - start) / A(axis.bins);
  int count = 0;
#pragma unroll 1
  for (int sample = 0; sample < axis.samples; ++sample) {
    int cells[2];
    A weights[2];
    const A position = sample_position(start, bin_size, bin, sample, axis.samples);
    if (!sample_cells(position, axis.length, cells[0], cells[1], weights[0], weights[1])) continue;
    for (int side = 0; side < 2; ++side) {
      if (weights[side] == A(0)) continue;
      // Samples advance, so a cell seen before is one of the last two; in mirrored boxes it may be listed twice.
      int at = count;
      for (int back = 1; back <= 2 && back <= count; ++back) {
        if (taps[count - back].index == cells[side]) at = count - back;
      }
      if (at == count) taps[count++] = {cells[side], A(0)};
      taps[at].weight += weights[side];
    }
  }
#pragma unroll 1
  for (int tap = 0; tap < count; ++tap) taps[tap].weight /= A(axis.samples);
  return count;
}

template <typename N>
MRCNN3D_DEVICE N pick(int which, N first, N second, N third) {
  return which == 0 ? first : which == 1 ? second : third;
}

// A box as taps by bin, in shared memory: for each axis `bins` lists of `2 * samples` places, then their counts.
template <typename A>
struct BoxTaps {
  const Axis<A>&z, &y, &x;
  Tap<A>* taps;
  int* counts;

  MRCNN3D_DEVICE const Tap<A>* of(int list) const { return taps + list * z.capacity(); }

  // To be called by all threads of a block, which must be in step before and after.
  MRCNN3D_DEVICE void fill(const A* box) const {
#pragma unroll 1
    for (int list = threadIdx.x; list < z.bins + y.bins + x.bins; list += blockDim.x) {
      const int which = (list >= z.bins) + (list >= z.bins + y.bins);
      const int bin = list - (which > 0 ? z.bins : 0) - (which > 1 ? y.bins : 0);
      const Axis<A> axis = {pick(which, z.bins, y.bins, x.bins), pick(which, z.length, y.length, x.length), z.samples,
                            pick(which, z.scale, y.scale, x.scale)};
      counts[list] = bin_taps(axis, box[which], box[which + 3], bin, taps + list * z.capacity());
    }
  }
};

// The part of a plane under one column: taps whose index is an offset into the plane in bytes.
template <typename T, int V>
struct PlaneTaps {
  using A = typename SumOf<T>::Type;
  const Tap<A>* taps;
  int count;

  MRCNN3D_DEVICE Sums<A, V> sum(const T* plane) const {
    Sums<A, V> sums;
    sums.clear();
#pragma unroll 4  // loads under way at a time; one sample per bin has just so many taps
    for (int t = 0; t < count; ++t) sums.add(taps[t].weight, load<T, V>(plane, taps[t].index));
    return sums;
  }
};

// Weighted sums over one column of a volume: the taps in its planes are fixed, those along z come one list at a time.
// Following lists overlap in at most two planes, so the sums of the last two planes are kept.
template <typename T, int V, typename InPlane>
struct Column {
  using A = typename SumOf<T>::Type;
  const T* source;
  unsigned plane_bytes;
  InPlane in_plane;
  int last_plane = -1, plane_before = -1;
  Sums<A, V> last, before;

  MRCNN3D_DEVICE Column(const T* first, unsigned plane_size, const InPlane& taps)
      : source(first), plane_bytes(plane_size), in_plane(taps) {}

  MRCNN3D_DEVICE void add_to(Sums<A, V>& sums, const Tap<A>* planes, int plane_count) {
#pragma unroll 1
    for (int t = 0; t < plane_count; ++t) {
      const Tap<A> tap = planes[t];
      if (tap.index != last_plane && tap.index != plane_before) {
        before = last;
        plane_before = last_plane;
        last = in_plane.sum(shifted(source, Bits(unsigned(tap.index)) * plane_bytes));
        last_plane = tap.index;
      }
      sums.add_one_of(tap.weight, tap.index == last_plane, last, before);
    }
  }
};

// The geometry of a call. Everything fits an int, as do the cells of a plane and the channels of a row together.
template <typename A>
struct Geometry {
  int rois, batch, channels;
  int lanes;    // threads that share a column, each with its own channels
  int columns;  // that a block works on at a time
  Axis<A> z, y, x;

  MRCNN3D_DEVICE int slices(int vector) const { return (channels + lanes * vector - 1) / (lanes * vector); }
  MRCNN3D_DEVICE Int bins() const { return Int(z.bins) * y.bins * x.bins; }
  template <typename T>
  MRCNN3D_DEVICE unsigned bin_plane() const {  // bytes
    return unsigned(y.bins * x.bins * channels) * unsigned(sizeof(T));
  }
  MRCNN3D_DEVICE int taps() const { return (z.bins + y.bins + x.bins) * z.capacity(); }
  MRCNN3D_DEVICE Int cell(int entry, int plane, int row, int place) const {
    return ((Int(entry) * z.length + plane) * y.length + row) * x.length + place;
  }
};

// A block makes `columns` columns of bins in one slice of channels (grid x), of one RoI (grid y).
//
// The taps of a column's bins in a plane are multiplied out once, in shared memory, for all planes and channels; a
// thread then reads each of its planes once. At 7 bins, 8 lanes and one sample: 392 threads, 11 planes of 4 taps each.
template <typename T, int V>
MRCNN3D_DEVICE void roi_align(const T* features, const typename SumOf<T>::Type* boxes, const Int* batch_index, T* out,
                              const Geometry<typename SumOf<T>::Type>& geometry) {
  using A = typename SumOf<T>::Type;
  const auto& [rois, batch, channels, lanes, columns, z, y, x] = geometry;
  const int places = y.capacity() * x.capacity(), cell_bytes = channels * int(sizeof(T));
  Tap<A>* box_taps = reinterpret_cast<Tap<A>*>(shared_memory);
  Tap<A>* column_taps = box_taps + geometry.taps();  // [columns, places]
  const BoxTaps<A> taps = {z, y, x, box_taps, reinterpret_cast<int*>(column_taps + columns * places)};
  const int *y_counts = taps.counts + z.bins, *x_counts = y_counts + y.bins;
  const int slices = geometry.slices(V), first_column = int(blockIdx.x) / slices * columns;
  const int count = min(columns, y.bins * x.bins - first_column);
  const int first_channel = int(blockIdx.x) % slices * lanes * V;
  for (int roi = blockIdx.y; roi < rois; roi += gridDim.y) {
    const Int entry = batch_index[roi];
    const bool present = entry >= 0 && entry < batch;
    if (present) taps.fill(boxes + Int(roi) * 6);
    __syncthreads();
    for (int place = threadIdx.x; place < count * places && present; place += blockDim.x) {
      const int row = (first_column + place / places) / x.bins, cell = (first_column + place / places) % x.bins;
      const int tap = place % places;
      if (tap < y_counts[row] * x_counts[cell]) {
        const Tap<A> in_y = taps.of(z.bins + row)[tap / x_counts[cell]];
        const Tap<A> in_x = taps.of(z.bins + y.bins + cell)[tap % x_counts[cell]];
        column_taps[place] = {(in_y.index * x.length + in_x.index) * cell_bytes, in_y.weight * in_x.weight};
      }
    }
    __syncthreads();
    for (int item = threadIdx.x; item < count * lanes; item += blockDim.x) {
      const int column = item / lanes, channel = first_channel + item % lanes * Pack<T, V>::size;
      if (channel >= channels) continue;
      const int index = first_column + column;
      const int in_plane = present ? y_counts[index / x.bins] * x_counts[index % x.bins] : 0;
      const T* source = features + geometry.cell(present ? int(entry) : 0, 0, 0, 0) * channels + channel;
      Column<T, V, PlaneTaps<T, V>> sampled(source, y.length * x.length * cell_bytes,
                                            {column_taps + column * places, in_plane});
      T* target = out + (roi * geometry.bins() + index) * channels + channel;
#pragma unroll 1
      for (int bin = 0; bin < z.bins; ++bin) {
        Sums<A, V> sums;
        sums.clear();
        if (in_plane > 0) sampled.add_to(sums, taps.of(bin), taps.counts[bin]);
        Pack<T, V> pack;
        for (int v = 0; v < V; ++v) narrow(sums.values[v], pack[v]);
        store(target, pack);
        target += Int(y.bins) * x.bins * channels;
      }
    }
    __syncthreads();  // the next RoI's taps take the place of these
  }
}

}  // namespace mrcnn3d
