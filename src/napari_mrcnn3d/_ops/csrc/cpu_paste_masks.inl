// Masks into a label volume: a few z planes of it per task, the worst mask first, so that better ones paint over it.

// Where the centre of a voxel lies along one axis of a mask: between two cells, `share` of the way.
struct Place {
  int64_t below, above;
  float share;
};

// Positions are double: in a volume of thousands of voxels float would be off by a thousandth of a cell.
inline Place place_of(int64_t voxel, double low, double high, int64_t cells) {
  const double last = double(cells - 1);
  double position = (double(voxel) + 0.5 - low) / (high - low) * double(cells) - 0.5;
  position = position < 0 ? 0 : position;
  position = position > last ? last : position;
  const int64_t below = int64_t(position);
  return {below, smaller(below + 1, cells - 1), float(position - double(below))};
}

inline float between(float a, float b, float share) { return a + (b - a) * share; }

// No number counts as 0, an infinite one as one that can still be interpolated.
inline float usable(float value) {
  constexpr float most = 1e30f;
  value = value == value ? value : 0.f;
  value = value > most ? most : value;
  return value < -most ? -most : value;
}

struct PasteSpace {
  float* plane;    // of the mask, interpolated along z: [cells y, cells x]
  float* rows[2];  // of that plane, interpolated along x at each voxel: even ones and odd ones
  int64_t* below;  // for each voxel along x
  int64_t* above;
  float* share;
};

inline PasteSpace lay_out_paste(const PasteCall& call, Arena& arena) {
  const int64_t width = call.extent[2];
  return {arena.take<float>(call.cells[1] * call.cells[2]),
          {arena.take<float>(width), arena.take<float>(width)},
          arena.take<int64_t>(width),
          arena.take<int64_t>(width),
          arena.take<float>(width)};
}

size_t paste_scratch_bytes(const PastePlan& plan) {
  Arena arena(nullptr);
  lay_out_paste(plan.call, arena);
  return arena.used();
}

// Row `cell` of the plane at each of `count` voxels along x.
inline void stretch_row(const PasteSpace& space, const float* row, int64_t count, float* stretched) {
  for (int64_t x = 0; x < count; ++x) stretched[x] = between(row[space.below[x]], row[space.above[x]], space.share[x]);
}

inline void paint_row(int32_t* voxels, const float* a, const float* b, float share, int64_t count, float threshold,
                      int32_t label) {
  for (int64_t x = 0; x < count; ++x) voxels[x] = between(a[x], b[x], share) >= threshold ? label : voxels[x];
}

// Mask k on the plane z of the volume.
void paint_plane(const PastePlan& plan, int64_t k, int64_t z, const PasteSpace& space) {
  const PasteCall& call = plan.call;
  const VoxelRange& range = plan.ranges[k];
  const double* const box = call.boxes + k * 6;
  const int64_t area = call.cells[1] * call.cells[2], count = range.stop[2] - range.first[2];
  const Place in_z = place_of(z, box[0], box[3], call.cells[0]);
  const float* const mask = call.masks + k * call.cells[0] * area;
  const float *const below = mask + in_z.below * area, *const above = mask + in_z.above * area;
  for (int64_t i = 0; i < area; ++i) space.plane[i] = between(usable(below[i]), usable(above[i]), in_z.share);
  int64_t held[2] = {-1, -1};
  for (int64_t y = range.first[1]; y < range.stop[1]; ++y) {
    const Place in_y = place_of(y, box[1], box[4], call.cells[1]);
    const int64_t cells[2] = {in_y.below, in_y.above};
    for (const int64_t cell : cells) {
      if (held[cell & 1] == cell) continue;
      stretch_row(space, space.plane + cell * call.cells[2], count, space.rows[cell & 1]);
      held[cell & 1] = cell;
    }
    int32_t* const voxels = call.volume + (z * call.extent[1] + y) * call.extent[2] + range.first[2];
    paint_row(voxels, space.rows[in_y.below & 1], space.rows[in_y.above & 1], in_y.share, count,
              float(call.threshold), call.labels[k]);
  }
}

void paste_task(const PastePlan& plan, int64_t task, void* scratch) {
  const PasteCall& call = plan.call;
  Arena arena(scratch);
  const PasteSpace space = lay_out_paste(call, arena);
  const int64_t area = call.extent[1] * call.extent[2];
  const int64_t first = task * plan.planes, stop = smaller(first + plan.planes, call.extent[0]);
  memset(call.volume + first * area, 0, size_t((stop - first) * area) * sizeof(int32_t));
  for (int64_t k = call.count; k-- > 0;) {
    const VoxelRange& range = plan.ranges[k];
    const int64_t begin = larger(first, range.first[0]), end = smaller(stop, range.stop[0]);
    if (begin >= end || range.first[1] >= range.stop[1] || range.first[2] >= range.stop[2]) continue;
    for (int64_t x = range.first[2]; x < range.stop[2]; ++x) {
      const Place in_x = place_of(x, call.boxes[k * 6 + 2], call.boxes[k * 6 + 5], call.cells[2]);
      space.below[x - range.first[2]] = in_x.below;
      space.above[x - range.first[2]] = in_x.above;
      space.share[x - range.first[2]] = in_x.share;
    }
    for (int64_t z = begin; z < end; ++z) paint_plane(plan, k, z, space);
  }
}
