// RoIAlign and its transpose, channels last.
//
// The trilinear weight of a sample is a product of one weight per axis, and so is the mean over the samples of a bin.
// So each axis of a RoI is a small sparse matrix between bins and cells, however many samples there are, and both
// directions are one contraction: every destination is a weighted sum of sources, first along z and y together into
// one row of sources along x, which stays in the cache, then along x. A destination is written by one task, RoI after
// RoI in their order: the result does not depend on the number of threads.

// A summand: `weight` times the source at `offset`.
template <typename T>
struct Tap {
  int64_t offset;
  T weight;
};

// A sparse matrix row by row: a row is a destination, the offsets of its taps are positions in the list of sources.
template <typename T>
struct Matrix {
  int64_t rows;
  int64_t* begin;  // of each row in `taps`, and the end of the last
  Tap<T>* taps;
};

// One axis of a RoI.
template <typename T>
struct Axis {
  Matrix<T> bins;   // from the cells that the RoI touches
  Matrix<T> cells;  // from the bins; only where the transpose is asked for
  int* touched;     // cells, in the order in which they are met
  int64_t touched_count;
};

// What a task needs beside its input and output.
template <typename T>
struct Workspace {
  Axis<T> axes[3];
  int* slots;     // position of each cell in `touched`, or -1
  Tap<T>* pairs;  // products of the taps along z and y
  T* row;         // sources along x, one after the other
};

// The upper half of a float, which is computed with as that float.
struct BFloat16 {
  uint16_t bits;
};

// A task's share of a call: some of the channels of one RoI, or of a few z planes of cells. The input may be stored in
// another type than T, in which sums are made and given.
template <typename T, typename Stored>
struct Share {
  const RoIAlignCall& call;
  int64_t first_channel, channels;
  Workspace<T> space;

  const Stored* input(int64_t position) const {
    return static_cast<const Stored*>(call.input) + position * call.channels + first_channel;
  }
  T* output(int64_t position) const { return static_cast<T*>(call.output) + position * call.channels + first_channel; }
};

inline int64_t product(const int64_t* three) { return three[0] * three[1] * three[2]; }

// ------------------------------------------------------------------------------------------------ scratch memory

template <typename T>
Matrix<T> take_matrix(Arena& arena, int64_t rows, int64_t taps) {
  return {0, arena.take<int64_t>(rows + 1), arena.take<Tap<T>>(taps)};
}

template <typename T>
Workspace<T> lay_out(const RoIAlignPlan& plan, Arena& arena) {
  const RoIAlignCall& call = plan.call;
  const bool transposed = call.is_transposed;
  Workspace<T> space;
  int64_t longest = 0, bin_taps[3], touched[3];
  for (int a = 0; a < 3; ++a) {
    bin_taps[a] = smaller(2 * call.samples, call.extent[a]);
    touched[a] = smaller(2 * call.samples * call.bins[a], call.extent[a]);
    longest = larger(longest, call.extent[a]);
    space.axes[a].bins = take_matrix<T>(arena, call.bins[a], call.bins[a] * bin_taps[a]);
    if (transposed) space.axes[a].cells = take_matrix<T>(arena, touched[a], call.bins[a] * bin_taps[a]);
    space.axes[a].touched = arena.take<int>(touched[a]);
  }
  space.slots = arena.take<int>(longest);
  for (int64_t cell = 0; space.slots && cell < longest; ++cell) space.slots[cell] = -1;
  space.pairs = arena.take<Tap<T>>(transposed ? call.bins[0] * call.bins[1] : bin_taps[0] * bin_taps[1]);
  space.row = arena.take<T>((transposed ? call.bins[2] : touched[2]) * plan.slice);
  return space;
}

template <typename T>
size_t roi_align_scratch_bytes(const RoIAlignPlan& plan) {
  Arena arena(nullptr);
  lay_out<T>(plan, arena);
  return arena.used();
}

// ------------------------------------------------------------------------------------------------ one axis of a RoI

template <typename T>
int64_t slot_of(Axis<T>& axis, int cell, int* slots) {
  if (slots[cell] < 0) {
    slots[cell] = int(axis.touched_count);
    axis.touched[axis.touched_count++] = cell;
  }
  return slots[cell];
}

// Adds to the tap at this offset among [first, end), or appends one; returns the new end.
template <typename T>
Tap<T>* add_tap(Tap<T>* first, Tap<T>* end, int64_t offset, T weight) {
  for (Tap<T>* tap = end; tap-- != first;) {
    if (tap->offset == offset) {
      tap->weight += weight;
      return end;
    }
  }
  *end = {offset, weight};
  return end + 1;
}

// Fills `axis.bins` and `axis.touched` for a RoI from `low` to `high` in cells.
template <typename T>
void weigh_bins(Axis<T>& axis, T low, T high, int bins, int samples, int length, int* slots) {
  const T start = low - T(0.5);
  const T bin_size = (high - T(0.5) - start) / T(bins);
  Tap<T>* end = axis.bins.taps;
  axis.bins.rows = bins;
  axis.touched_count = 0;
  for (int bin = 0; bin < bins; ++bin) {
    Tap<T>* const first = end;
    axis.bins.begin[bin] = first - axis.bins.taps;
    for (int index = 0; index < samples; ++index) {
      int below, above;
      T below_weight, above_weight;
      const T position = mrcnn3d::sample_position<T>(start, bin_size, bin, index, samples);
      if (!mrcnn3d::sample_cells<T>(position, length, below, above, below_weight, above_weight)) continue;
      end = add_tap(first, end, slot_of(axis, below, slots), below_weight);
      if (above_weight > T(0)) end = add_tap(first, end, slot_of(axis, above, slots), above_weight);
    }
    for (Tap<T>* tap = first; tap != end; ++tap) tap->weight /= T(samples);
  }
  axis.bins.begin[bins] = end - axis.bins.taps;
  for (int64_t i = 0; i < axis.touched_count; ++i) slots[axis.touched[i]] = -1;
}

// Fills `axis.cells` from `axis.bins`.
template <typename T>
void transpose_bins(Axis<T>& axis) {
  const Matrix<T>& from = axis.bins;
  Matrix<T>& to = axis.cells;
  to.rows = axis.touched_count;
  for (int64_t row = 0; row <= to.rows; ++row) to.begin[row] = 0;
  for (int64_t i = 0; i < from.begin[from.rows]; ++i) ++to.begin[from.taps[i].offset];
  for (int64_t row = 1; row <= to.rows; ++row) to.begin[row] += to.begin[row - 1];
  for (int64_t bin = from.rows; bin-- > 0;)  // each end runs down to a beginning as its row fills
    for (int64_t i = from.begin[bin]; i < from.begin[bin + 1]; ++i)
      to.taps[--to.begin[from.taps[i].offset]] = {bin, from.taps[i].weight};
}

// Weighs axis `a` of a RoI; whether it touches any cell.
template <typename T, typename Stored>
bool weigh_axis(Share<T, Stored>& share, int64_t roi, int a) {
  const RoIAlignCall& call = share.call;
  const T* const box = static_cast<const T*>(call.boxes) + roi * 6;
  const T low = box[a] * T(call.scale[a]), high = box[a + 3] * T(call.scale[a]);
  Axis<T>& axis = share.space.axes[a];
  weigh_bins<T>(axis, low, high, int(call.bins[a]), int(call.samples), int(call.extent[a]), share.space.slots);
  if (call.is_transposed) transpose_bins(axis);
  return axis.touched_count > 0;
}

// ------------------------------------------------------------------------------------------------ the contraction

inline float value_of(float stored) { return stored; }
inline double value_of(double stored) { return stored; }
inline float value_of(BFloat16 stored) {
  const uint32_t bits = uint32_t(stored.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Neighbouring channels as one value, wherever it lies. Compilers that know such a type use the registers well with it;
// what they make by themselves of plain loops over a few registers is a matter of luck.
#if defined(__GNUC__) || defined(__clang__)
template <typename T>
struct Pack {
  typedef T Values __attribute__((vector_size(MRCNN3D_PACK_BYTES), aligned(sizeof(T)), may_alias));
};

inline Pack<float>::Values load(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(MRCNN3D_PACK_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t Wholes __attribute__((vector_size(MRCNN3D_PACK_BYTES)));
  const Wholes bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Wholes) << 16;
  return reinterpret_cast<Pack<float>::Values>(bits);
}
#else
template <typename T>
struct Pack {
  typedef T Values;
};

inline float load(const BFloat16* from) { return value_of(*from); }
#endif

template <typename T>
typename Pack<T>::Values load(const T* from) {
  return *reinterpret_cast<const typename Pack<T>::Values*>(from);
}

// output[channel] = (with ADD, +=) the sum over the taps, PACKS packs at a time from `channel` on while they last;
// returns the channel after them.
template <typename T, bool ADD, int PACKS, typename Stored>
int64_t weighted_sums(T* output, const Stored* input, const Tap<T>* taps, int64_t count, int64_t channel,
                      int64_t channels) {
  using Values = typename Pack<T>::Values;
  constexpr int64_t BLOCK = PACKS * int64_t(sizeof(Values) / sizeof(T));
  for (; channel + BLOCK <= channels; channel += BLOCK) {
    Values* const to = reinterpret_cast<Values*>(output + channel);
    Values sums[PACKS] = {};
    for (int k = 0; ADD && k < PACKS; ++k) sums[k] = to[k];
    for (const Tap<T>* tap = taps; tap != taps + count; ++tap) {
      const Stored* const from = input + tap->offset + channel;
      for (int k = 0; k < PACKS; ++k) sums[k] += tap->weight * load(from + k * (BLOCK / PACKS));
    }
    for (int k = 0; k < PACKS; ++k) to[k] = sums[k];
  }
  return channel;
}

template <typename T, bool ADD, typename Stored>
void weighted_sum(T* output, const Stored* input, const Tap<T>* taps, int64_t count, int64_t channels) {
  int64_t channel = weighted_sums<T, ADD, 8>(output, input, taps, count, 0, channels);
  channel = weighted_sums<T, ADD, 2>(output, input, taps, count, channel, channels);
  channel = weighted_sums<T, ADD, 1>(output, input, taps, count, channel, channels);
  for (; channel < channels; ++channel) {
    T sum = ADD ? output[channel] : T(0);
    for (int64_t i = 0; i < count; ++i) sum += taps[i].weight * value_of(input[taps[i].offset + channel]);
    output[channel] = sum;
  }
}

// One axis of a contraction: which matrix, and where its destinations and sources lie.
template <typename T>
struct Factor {
  Matrix<T> matrix;
  const int* destinations;  // none: one after the other
  const int* sources;
  int64_t source_count, destination_stride, source_stride;

  int64_t destination(int64_t row) const { return (destinations ? destinations[row] : row) * destination_stride; }
  int64_t source(int64_t index) const { return (sources ? sources[index] : index) * source_stride; }
};

// The contraction along z, y and x of a RoI whose axes are weighed.
template <typename T>
struct Contraction {
  Factor<T> z, y, x;

  template <typename Stored>
  explicit Contraction(const Share<T, Stored>& share) {
    const RoIAlignCall& call = share.call;
    Factor<T>* const factors[3] = {&z, &y, &x};
    int64_t value_stride = call.channels, cell_stride = call.channels;
    for (int a = 2; a >= 0; --a) {
      const Axis<T>& axis = share.space.axes[a];
      if (call.is_transposed)
        *factors[a] = {axis.cells, axis.touched, nullptr, call.bins[a], cell_stride, value_stride};
      else
        *factors[a] = {axis.bins, nullptr, axis.touched, axis.touched_count, value_stride, cell_stride};
      value_stride *= call.bins[a];
      cell_stride *= call.extent[a];
    }
    const int64_t taps = x.matrix.begin[x.matrix.rows];
    for (int64_t i = 0; i < taps; ++i) x.matrix.taps[i].offset *= share.channels;  // its sources are in `row`
  }
};

template <typename T>
int64_t multiply_taps(const Factor<T>& z, int64_t z_row, const Factor<T>& y, int64_t y_row, Tap<T>* pairs) {
  int64_t count = 0;
  for (int64_t i = z.matrix.begin[z_row]; i < z.matrix.begin[z_row + 1]; ++i) {
    for (int64_t j = y.matrix.begin[y_row]; j < y.matrix.begin[y_row + 1]; ++j) {
      const Tap<T>&in_z = z.matrix.taps[i], &in_y = y.matrix.taps[j];
      pairs[count++] = {z.source(in_z.offset) + y.source(in_y.offset), in_z.weight * in_y.weight};
    }
  }
  return count;
}

// Sums the sources along z and y into `row`; those that are neighbours in memory in one go.
template <typename T, typename Stored>
void fill_row(const Share<T, Stored>& share, const Factor<T>& x, int64_t pairs, const Stored* input) {
  for (int64_t first = 0, next; first < x.source_count; first = next) {
    const int64_t begin = x.source(first);
    next = first + 1;
    while (next < x.source_count && x.source(next) == begin + (next - first) * share.channels) ++next;
    weighted_sum<T, false>(share.space.row + first * share.channels, input + begin, share.space.pairs, pairs,
                           (next - first) * share.channels);
  }
}

// Writes, or with ADD adds to, the destinations of one row along z. What has no taps becomes 0.
template <bool ADD, typename T, typename Stored>
void contract(const Share<T, Stored>& share, const Contraction<T>& by, int64_t z_row, const Stored* input, T* output) {
  const Matrix<T>& along_x = by.x.matrix;
  for (int64_t y_row = 0; y_row < by.y.matrix.rows; ++y_row) {
    T* const line = output + by.z.destination(z_row) + by.y.destination(y_row);
    const int64_t pairs = multiply_taps(by.z, z_row, by.y, y_row, share.space.pairs);
    if (pairs) fill_row(share, by.x, pairs, input);
    for (int64_t x_row = 0; x_row < along_x.rows; ++x_row) {
      const Tap<T>* const taps = along_x.taps + along_x.begin[x_row];
      const int64_t count = pairs ? along_x.begin[x_row + 1] - along_x.begin[x_row] : 0;
      weighted_sum<T, ADD>(line + by.x.destination(x_row), share.space.row, taps, count, share.channels);
    }
  }
}

// ------------------------------------------------------------------------------------------------ tasks

template <typename T, typename Stored>
void clear(Share<T, Stored>& share, int64_t first, int64_t count) {
  for (int64_t i = first; i < first + count; ++i) memset(share.output(i), 0, size_t(share.channels) * sizeof(T));
}

template <typename T, typename Stored>
void sample_roi(Share<T, Stored>& share, int64_t roi) {
  const RoIAlignCall& call = share.call;
  const int64_t entry = call.batch_index[roi], bins = product(call.bins);
  bool seen = entry >= 0 && entry < call.entries;
  for (int a = 0; seen && a < 3; ++a) seen = weigh_axis(share, roi, a);
  if (!seen) return clear(share, roi * bins, bins);
  const Contraction<T> by(share);
  const Stored* const input = share.input(entry * product(call.extent));
  for (int64_t z = 0; z < call.bins[0]; ++z) contract<false>(share, by, z, input, share.output(roi * bins));
}

// Adds a RoI's values to those of its entry's z planes that lie in [first, stop).
template <typename T, typename Stored>
void spread_roi(Share<T, Stored>& share, int64_t roi, int64_t first, int64_t stop) {
  const RoIAlignCall& call = share.call;
  const Axis<T>& z = share.space.axes[0];
  const auto wanted = [&](int64_t row) { return first <= z.touched[row] && z.touched[row] < stop; };
  weigh_axis(share, roi, 0);
  int64_t row = 0;
  while (row < z.touched_count && !wanted(row)) ++row;
  if (row == z.touched_count || !weigh_axis(share, roi, 1) || !weigh_axis(share, roi, 2)) return;
  const Contraction<T> by(share);
  const Stored* const values = share.input(roi * product(call.bins));
  T* const maps = share.output(call.batch_index[roi] * product(call.extent));
  for (; row < z.touched_count; ++row)
    if (wanted(row)) contract<true>(share, by, row, values, maps);
}

// Adds all RoIs to a few z planes, which stay in the cache meanwhile.
template <typename T, typename Stored>
void spread_to_planes(Share<T, Stored>& share, int64_t entry, int64_t first, int64_t stop) {
  const RoIAlignCall& call = share.call;
  const int64_t area = call.extent[1] * call.extent[2];
  clear(share, (entry * call.extent[0] + first) * area, (stop - first) * area);
  for (int64_t roi = 0; roi < call.rois; ++roi)
    if (call.batch_index[roi] == entry) spread_roi(share, roi, first, stop);
}

template <typename T, typename Stored>
void roi_align_task(const RoIAlignPlan& plan, int64_t task, void* scratch) {
  const RoIAlignCall& call = plan.call;
  Arena arena(scratch);
  const int64_t unit = task / plan.slices, first_channel = task % plan.slices * plan.slice;
  Share<T, Stored> share{call, first_channel, smaller(plan.slice, call.channels - first_channel), lay_out<T>(plan, arena)};
  if (!call.is_transposed) return sample_roi(share, plan.order[unit]);
  const int64_t slabs = (call.extent[0] + plan.planes - 1) / plan.planes, first = unit % slabs * plan.planes;
  spread_to_planes(share, unit / slabs, first, smaller(first + plan.planes, call.extent[0]));
}
