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
  Matrix<T> cells;  // from the bins; filled where the transpose is asked for
  int* touched;     // cells, in the order in which they are met
  int64_t touched_count;
};

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

// What a task needs beside its input and output.
template <typename T>
struct Workspace {
  Axis<T> axes[3];
  int* slots;     // position of each cell in `touched`, or -1
  Tap<T>* pairs;  // products of the taps along z and y
  T* row;         // sources along x
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cuts one block of memory into pieces; without a block it only measures.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)), used_(0) {}

  template <typename Item>
  Item* take(int64_t count) {
    const int64_t at = used_;
    const int64_t bytes = smaller(count, LIMIT / int64_t(sizeof(Item))) * int64_t(sizeof(Item));
    used_ = smaller(LIMIT, used_ + (bytes + 63) / 64 * 64);
    return block_ ? reinterpret_cast<Item*>(block_ + at) : nullptr;
  }

  // More than can be had, rather than less than is needed, where a product of sizes is beyond all measure.
  size_t used() const { return used_ < LIMIT ? size_t(used_) : SIZE_MAX; }

 private:
  static constexpr int64_t LIMIT = int64_t(1) << 46;
  char* block_;
  int64_t used_;
};

template <typename T>
Matrix<T> take_matrix(Arena& arena, int64_t rows, int64_t taps) {
  return {0, arena.take<int64_t>(rows + 1), arena.take<Tap<T>>(taps)};
}

template <typename T>
Workspace<T> lay_out(const RoIAlignPlan& plan, Arena& arena) {
  const RoIAlignCall& call = plan.call;
  Workspace<T> space;
  int64_t longest = 0, taps_of_a_bin[3], touched[3];
  for (int a = 0; a < 3; ++a) {
    taps_of_a_bin[a] = smaller(2 * call.samples, call.extent[a]);
    touched[a] = smaller(2 * call.samples * call.bins[a], call.extent[a]);
    longest = larger(longest, call.extent[a]);
    const int64_t taps = call.bins[a] * taps_of_a_bin[a];
    space.axes[a].bins = take_matrix<T>(arena, call.bins[a], taps);
    if (call.is_transposed) space.axes[a].cells = take_matrix<T>(arena, touched[a], taps);
    space.axes[a].touched = arena.take<int>(touched[a]);
  }
  space.slots = arena.take<int>(longest);
  space.pairs = arena.take<Tap<T>>(call.is_transposed ? call.bins[0] * call.bins[1]
                                                      : taps_of_a_bin[0] * taps_of_a_bin[1]);
  space.row = arena.take<T>((call.is_transposed ? call.bins[2] : touched[2]) * plan.slice);
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

// Adds to the tap at this offset among [first, end), appended where it is missing; returns the new end.
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
  axis.touched_count = 0;
  axis.bins.rows = bins;
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
  const Matrix<T>&from = axis.bins, &to = axis.cells;
  axis.cells.rows = axis.touched_count;
  for (int64_t row = 0; row <= to.rows; ++row) to.begin[row] = 0;
  for (int64_t i = 0; i < from.begin[from.rows]; ++i) ++to.begin[from.taps[i].offset];
  for (int64_t row = 1; row <= to.rows; ++row) to.begin[row] += to.begin[row - 1];
  for (int64_t bin = from.rows; bin-- > 0;)  // backwards, so that the counts run down to the beginnings
    for (int64_t i = from.begin[bin]; i < from.begin[bin + 1]; ++i)
      to.taps[--to.begin[from.taps[i].offset]] = {bin, from.taps[i].weight};
}

// Weighs one axis of a RoI; whether it touches any cell.
template <typename T>
bool weigh_axis(const RoIAlignCall& call, int64_t roi, int a, Workspace<T>& space) {
  const T* const box = static_cast<const T*>(call.boxes) + roi * 6;
  const T scale = T(call.scale[a]);
  Axis<T>& axis = space.axes[a];
  weigh_bins<T>(axis, box[a] * scale, box[a + 3] * scale, int(call.bins[a]), int(call.samples), int(call.extent[a]),
                space.slots);
  if (call.is_transposed && axis.touched_count) transpose_bins(axis);
  return axis.touched_count > 0;
}

// ------------------------------------------------------------------------------------------------ the contraction

// Neighbouring channels as one value, wherever it lies. Compilers that know such a type use the registers well with it;
// what they make by themselves of plain loops over a few registers is a matter of luck.
#if defined(__GNUC__) || defined(__clang__)
template <typename T>
struct Pack {
  typedef T Values __attribute__((vector_size(MRCNN3D_PACK_BYTES), aligned(sizeof(T)), may_alias));
};
#else
template <typename T>
struct Pack {
  typedef T Values;
};
#endif

// output[channel] = (with ADD, +=) the sum over the taps, PACKS packs at a time from `channel` on; returns where the
// rest begins.
template <typename T, bool ADD, int PACKS>
int64_t weighted_sums(T* output, const T* input, const Tap<T>* taps, int64_t count, int64_t channel, int64_t channels) {
  using Values = typename Pack<T>::Values;
  constexpr int64_t BLOCK = PACKS * int64_t(sizeof(Values) / sizeof(T));
  for (; channel + BLOCK <= channels; channel += BLOCK) {
    Values* const to = reinterpret_cast<Values*>(output + channel);
    Values sums[PACKS] = {};
    for (int k = 0; ADD && k < PACKS; ++k) sums[k] = to[k];
    for (const Tap<T>* tap = taps; tap != taps + count; ++tap) {
      const Values* const from = reinterpret_cast<const Values*>(input + tap->offset + channel);
      for (int k = 0; k < PACKS; ++k) sums[k] += tap->weight * from[k];
    }
    for (int k = 0; k < PACKS; ++k) to[k] = sums[k];
  }
  return channel;
}

template <typename T, bool ADD>
void weighted_sum(T* output, const T* input, const Tap<T>* taps, int64_t count, int64_t channels) {
  int64_t channel = weighted_sums<T, ADD, 4>(output, input, taps, count, 0, channels);
  channel = weighted_sums<T, ADD, 1>(output, input, taps, count, channel, channels);
  for (; channel < channels; ++channel) {
    T sum = ADD ? output[channel] : T(0);
    for (int64_t i = 0; i < count; ++i) sum += taps[i].weight * input[taps[i].offset + channel];
    output[channel] = sum;
  }
}

template <typename T>
int64_t multiply_taps(const Factor<T>& z, int64_t z_row, const Factor<T>& y, int64_t y_row, Tap<T>* pairs) {
  int64_t count = 0;
  for (int64_t i = z.matrix.begin[z_row]; i < z.matrix.begin[z_row + 1]; ++i)
    for (int64_t j = y.matrix.begin[y_row]; j < y.matrix.begin[y_row + 1]; ++j) {
      const Tap<T>&in_z = z.matrix.taps[i], &in_y = y.matrix.taps[j];
      pairs[count++] = {z.source(in_z.offset) + y.source(in_y.offset), in_z.weight * in_y.weight};
    }
  return count;
}

// Writes, or with ADD adds to, the destinations of one row along z.
template <typename T, bool ADD>
void contract(const Factor<T>* factors, int64_t z_row, const T* input, T* output, int64_t channels, Workspace<T>& s) {
  const Factor<T>&z = factors[0], &y = factors[1], &x = factors[2];
  for (int64_t y_row = 0; y_row < y.matrix.rows; ++y_row) {
    T* const line = output + z.destination(z_row) + y.destination(y_row);
    const int64_t pairs = multiply_taps(z, z_row, y, y_row, s.pairs);
    for (int64_t i = 0; pairs && i < x.source_count; ++i)
      weighted_sum<T, false>(s.row + i * channels, input + x.source(i), s.pairs, pairs, channels);
    for (int64_t x_row = 0; x_row < x.matrix.rows; ++x_row) {
      const int64_t begin = x.matrix.begin[x_row], count = pairs ? x.matrix.begin[x_row + 1] - begin : 0;
      weighted_sum<T, ADD>(line + x.destination(x_row), s.row, x.matrix.taps + begin, count, channels);
    }
  }
}

// ------------------------------------------------------------------------------------------------ tasks

// The contraction of a weighed RoI, for a task of so many channels.
template <typename T>
void make_factors(const RoIAlignCall& call, int64_t channels, Workspace<T>& space, Factor<T>* factors) {
  int64_t value_stride = call.channels, cell_stride = call.channels;
  for (int a = 2; a >= 0; --a) {
    const Axis<T>& axis = space.axes[a];
    if (call.is_transposed)
      factors[a] = {axis.cells, axis.touched, nullptr, call.bins[a], cell_stride, value_stride};
    else
      factors[a] = {axis.bins, nullptr, axis.touched, axis.touched_count, value_stride, cell_stride};
    value_stride *= call.bins[a];
    cell_stride *= call.extent[a];
  }
  const Matrix<T>& x = factors[2].matrix;
  for (int64_t i = 0; i < x.begin[x.rows]; ++i) x.taps[i].offset *= channels;  // sources are in `row`
}

int64_t product(const int64_t* three) { return three[0] * three[1] * three[2]; }

template <typename T>
void clear(T* rows, int64_t count, int64_t stride, int64_t channels) {
  for (int64_t i = 0; i < count; ++i) memset(rows + i * stride, 0, size_t(channels) * sizeof(T));
}

// One RoI, one slice of the channels.
template <typename T>
void sample_roi(const RoIAlignCall& call, int64_t roi, int64_t first_channel, int64_t channels, Workspace<T>& space) {
  const int64_t entry = call.batch_index[roi], bins = product(call.bins);
  T* const output = static_cast<T*>(call.output) + roi * bins * call.channels + first_channel;
  bool seen = entry >= 0 && entry < call.entries;
  for (int a = 0; seen && a < 3; ++a) seen = weigh_axis(call, roi, a, space);
  if (!seen) return clear(output, bins, call.channels, channels);
  Factor<T> factors[3];
  make_factors(call, channels, space, factors);
  const T* const input =
      static_cast<const T*>(call.input) + entry * product(call.extent) * call.channels + first_channel;
  for (int64_t z = 0; z < call.bins[0]; ++z) contract<T, false>(factors, z, input, output, channels, space);
}

// Adds a RoI's values to one z plane of its entry.
template <typename T>
void spread_roi(const RoIAlignCall& call, int64_t roi, int64_t plane, const T* input, T* output, int64_t channels,
                Workspace<T>& space) {
  if (!weigh_axis(call, roi, 0, space)) return;
  int64_t z = 0;
  while (z < space.axes[0].touched_count && space.axes[0].touched[z] != plane) ++z;
  if (z == space.axes[0].touched_count) return;
  if (!weigh_axis(call, roi, 1, space) || !weigh_axis(call, roi, 2, space)) return;
  Factor<T> factors[3];
  make_factors(call, channels, space, factors);
  contract<T, true>(factors, z, input, output, channels, space);
}

// One z plane of one entry, one slice of the channels: it stays in the cache while all RoIs are added.
template <typename T>
void spread_to_plane(const RoIAlignCall& call, int64_t entry, int64_t plane, int64_t first_channel, int64_t channels,
                     Workspace<T>& space) {
  const int64_t area = call.extent[1] * call.extent[2], bins = product(call.bins);
  T* const maps = static_cast<T*>(call.output) + entry * call.extent[0] * area * call.channels + first_channel;
  clear(maps + plane * area * call.channels, area, call.channels, channels);
  for (int64_t roi = 0; roi < call.rois; ++roi) {
    if (call.batch_index[roi] != entry) continue;
    const T* const values = static_cast<const T*>(call.input) + roi * bins * call.channels + first_channel;
    spread_roi(call, roi, plane, values, maps, channels, space);
  }
}

template <typename T>
void roi_align_task(const RoIAlignPlan& plan, int64_t task, void* scratch) {
  const RoIAlignCall& call = plan.call;
  Arena arena(scratch);
  Workspace<T> space = lay_out<T>(plan, arena);
  for (int64_t i = 0; i < larger(call.extent[0], larger(call.extent[1], call.extent[2])); ++i) space.slots[i] = -1;
  const int64_t unit = task / plan.slices, first_channel = task % plan.slices * plan.slice;
  const int64_t channels = smaller(plan.slice, call.channels - first_channel);
  if (call.is_transposed)
    spread_to_plane(call, unit / call.extent[0], unit % call.extent[0], first_channel, channels, space);
  else
    sample_roi(call, unit, first_channel, channels, space);
}
