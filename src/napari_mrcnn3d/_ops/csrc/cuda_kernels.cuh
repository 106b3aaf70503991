// The CUDA kernels. Includes nothing but common.h, so that NVRTC, nvcc and, after tests/ops/emulation/cuda.h, a C++
// compiler can read the same text. Compile without contraction (-fmad=false): where RoIAlign samples and what
// suppresses what must not depend on the device; sums use explicit fused multiply-adds.
//
// Parameters of kernels are pointers, 64-bit integers and doubles only, all of eight bytes, so that a caller cannot get
// a width wrong. Volumes are channels last. Where there can be more work than blocks, kernels stride over the grid.
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

// ------------------------------------------------------------------------------------------- RoIAlign: one axis
//
// The mean of trilinear samples over a bin is a weighted sum over cells, whose weights are products of one weight per
// axis. So per axis a bin is a list of taps (cell and weight), merged where samples share a cell: two samples per bin
// and axis then cost little more than one. The transpose reads the same lists by cell instead of by bin.

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

// The same from separate taps of the rows and of the places in them.
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

// ------------------------------------------------------------------------------------------- RoIAlign: forward

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

// ------------------------------------------------------------------------------------------- RoIAlign: transpose
//
// Gathers: the value of a cell is the sum over the bins that see it, so that a RoI adds to each of its cells once.

// Where the taps of a cell lie among those of its RoI and axis.
struct List {
  int first, count;
};

// The cells that a RoI touches: [low, high) along each axis; empty where it touches none.
struct Range {
  int low[3], high[3];
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

// ------------------------------------------------------------------------------------------- suppression
//
// Boxes come best first and are decided chunk by chunk, in three steps: drop what boxes kept from earlier chunks
// suppress; compare the boxes of the chunk with each other, 64 by 64 bits at a time; walk those bits in one block.
// How many are kept is known only to the device until the end.

constexpr int word_bits = 64;

struct alignas(16) ScoredBox {
  float low[3], volume, high[3], unused;
  Int group;
};

MRCNN3D_DEVICE ScoredBox scored_box(const float* boxes, const Int* groups, Int index) {
  const float* box = boxes + index * 6;
  return {{box[0], box[1], box[2]}, box_volume(box), {box[3], box[4], box[5]}, 0.f, groups ? groups[index] : 0};
}

// Whether one of two boxes of a group suppresses the other: intersection > threshold * union, rounded as everywhere.
// A coordinate that is no number makes its box's volume none, and with it the comparison false.
MRCNN3D_DEVICE bool suppresses(const ScoredBox& a, const ScoredBox& b, float threshold) {
  float sides[3];
  for (int axis = 0; axis < 3; ++axis) {
    sides[axis] = fmaxf(MRCNN3D_SUB(fminf(a.high[axis], b.high[axis]), fmaxf(a.low[axis], b.low[axis])), 0.f);
  }
  const float intersection = MRCNN3D_MUL(MRCNN3D_MUL(sides[0], sides[1]), sides[2]);
  const float united = MRCNN3D_SUB(MRCNN3D_ADD(a.volume, b.volume), intersection);
  return intersection > MRCNN3D_MUL(threshold, united) && a.group == b.group;
}

// The boxes [begin, begin + size) of all.
struct Chunk {
  const float* boxes;
  const Int* groups;  // none: all of one group
  Int begin;
  int size;
  float threshold;

  MRCNN3D_DEVICE int words() const { return (size + word_bits - 1) / word_bits; }
  MRCNN3D_DEVICE ScoredBox at(int index) const { return scored_box(boxes, groups, begin + index); }
};

// 64 threads compare 64 boxes of the chunk (grid x) with those kept, 64 at a time (shared by grid y); sets the bits of
// the suppressed.
MRCNN3D_DEVICE void nms_drop(const Chunk& chunk, const Int* kept, const Int* kept_count, Int limit, Bits* removed) {
  static __shared__ ScoredBox winners[word_bits];
  const Int count = *kept_count;
  if (count >= limit) return;
  const int index = int(blockIdx.x) * word_bits + threadIdx.x;
  bool suppressed = index >= chunk.size;
  const ScoredBox box = chunk.at(suppressed ? 0 : index);
  for (Int first = Int(blockIdx.y) * word_bits; first < count; first += Int(gridDim.y) * word_bits) {
    if (__syncthreads_and(suppressed)) break;
    const int found = int(min(Int(word_bits), count - first));
    if (int(threadIdx.x) < found)
      winners[threadIdx.x] = scored_box(chunk.boxes, chunk.groups, kept[first + threadIdx.x]);
    __syncthreads();
    for (int i = 0; i < found && !suppressed; ++i) suppressed = suppresses(winners[i], box, chunk.threshold);
  }
  if (suppressed) atomicOr(&removed[blockIdx.x], Bits(1) << threadIdx.x);
}

// 64 threads compare two groups of 64 boxes of the chunk: one tile of the upper triangle of the bit matrix
// [size, words]; grid x has words + 1 blocks, grid y half as many as there are words. Diagonal tiles hold both halves.
MRCNN3D_DEVICE void nms_compare(const Chunk& chunk, const Int* kept_count, Int limit, Bits* matrix) {
  static __shared__ ScoredBox others[word_bits];
  if (*kept_count >= limit) return;
  // Row `pair` of the triangle and the one as far from its end make words + 1 tiles together.
  const int words = chunk.words(), pair = blockIdx.y, offset = blockIdx.x;
  const bool longer = offset > pair;
  const int row_word = longer ? pair : words - 1 - pair, column_word = longer ? offset - 1 : words - 1 - offset;
  const int row = row_word * word_bits + threadIdx.x, column = column_word * word_bits + threadIdx.x;
  if (column < chunk.size) others[threadIdx.x] = chunk.at(column);
  __syncthreads();
  if (row >= chunk.size) return;
  const ScoredBox box = chunk.at(row);
  const int count = min(word_bits, chunk.size - column_word * word_bits);
  Bits bits = 0;
  for (int i = 0; i < count; ++i) bits |= Bits(suppresses(box, others[i], chunk.threshold)) << i;
  if (row_word == column_word) bits &= ~(Bits(1) << threadIdx.x);
  matrix[Int(row) * words + column_word] = bits;
}

MRCNN3D_DEVICE Bits ballot(bool first_half, bool second_half) {
  const Bits low = __ballot_sync(0xffffffffu, first_half), high = __ballot_sync(0xffffffffu, second_half);
  return low | high << 32;
}

// Which of 64 boxes are kept, worked out by one warp whose lane l has boxes l and l + 32. A box whose every earlier
// suppressor is out is in, and one that a kept box suppresses is out: a few rounds instead of 64 steps.
MRCNN3D_DEVICE Bits decide(Bits undecided, const Bits suppressors[2]) {
  Bits kept = 0;
  while (undecided != 0) {
    bool in[2], out[2];
    for (int half = 0; half < 2; ++half) {
      const bool open = undecided >> (threadIdx.x + 32 * half) & 1;
      in[half] = open && (suppressors[half] & (undecided | kept)) == 0;
      out[half] = open && (suppressors[half] & kept) != 0;
    }
    const Bits entered = ballot(in[0], in[1]), left = ballot(out[0], out[1]);
    kept |= entered;
    undecided &= ~(entered | left);
  }
  return kept;
}

// One block of 1024 threads walks the chunk and appends the positions of the boxes kept.
constexpr int keep_threads = 1024, keep_columns = 128, keep_rows = word_bits / (keep_threads / keep_columns);

MRCNN3D_DEVICE void nms_keep(const Chunk& chunk, const Bits* matrix, const Bits* dropped, Int limit, Int* kept,
                             Int* kept_count) {
  static __shared__ Bits winners;
  Bits* removed = reinterpret_cast<Bits*>(shared_memory);  // [words]
  const int words = chunk.words(), thread = threadIdx.x;
  for (int word = thread; word < words; word += blockDim.x) removed[word] = dropped[word];
  Int kept_before = *kept_count;
  Bits rows[2] = {0, 0};  // of this lane's two boxes in the diagonal tile, fetched one step ahead
  const auto fetch = [&](int word) {
    for (int half = 0; half < 2; ++half) {
      const int row = word * word_bits + thread + 32 * half;
      if (row < chunk.size) rows[half] = matrix[Int(row) * words + word];
    }
  };
  if (thread < 32) fetch(0);
  __syncthreads();
  for (int word = 0; word < words && kept_before < limit; ++word) {
    if (thread < 32) {
      const int left = chunk.size - word * word_bits;
      const Bits valid = left < word_bits ? (Bits(1) << left) - 1 : ~Bits(0);
      Bits suppressors[2], earlier[2];
      for (int half = 0; half < 2; ++half) {
        earlier[half] = (Bits(1) << (thread + 32 * half)) - 1;
        suppressors[half] = rows[half] & earlier[half];
      }
      const Bits decided = decide(valid & ~removed[word], suppressors);
      for (int half = 0; half < 2; ++half) {
        const Int place = kept_before + __popcll(decided & earlier[half]);
        if ((decided >> (thread + 32 * half) & 1) && place < limit) {
          kept[place] = chunk.begin + word * word_bits + thread + 32 * half;
        }
      }
      if (thread == 0) winners = decided;
      if (word + 1 < words) fetch(word + 1);
    }
    __syncthreads();
    kept_before += __popcll(winners);
    // Eight rows of winners per thread, loaded together; groups of 128 threads take neighbouring words.
    const int first_row = thread / keep_columns * keep_rows;
    const unsigned mine = unsigned(winners >> first_row) & ((1u << keep_rows) - 1);
    for (int column = word + 1 + thread % keep_columns; column < words && mine != 0; column += keep_columns) {
      const Bits* tile = matrix + (Int(word) * word_bits + first_row) * words + column;
      Bits bits = 0;
      for (int row = 0; row < keep_rows; ++row) bits |= mine >> row & 1 ? tile[Int(row) * words] : 0;
      if (bits != 0) atomicOr(&removed[column], bits);
    }
    __syncthreads();
  }
  if (thread == 0) *kept_count = min(kept_before, limit);
}

// ------------------------------------------------------------------------------------------- paste masks

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

// ------------------------------------------------------------------------------------------- entry points

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
