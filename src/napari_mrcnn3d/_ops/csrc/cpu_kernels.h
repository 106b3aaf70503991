// Between the exported functions (cpu_api.cpp) and the kernels, which are compiled once per instruction set.
// The calls are mirrored, field by field, by the ctypes structures of _cpu.py: a change needs a new ABI number there.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Where the compiler can switch AVX2 on inside a file, so that all files are compiled with the same flags.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MRCNN3D_WITH_AVX2 1
#else
#define MRCNN3D_WITH_AVX2 0
#endif

static_assert(sizeof(size_t) == sizeof(int64_t), "sizes are counted with 64 bits");

namespace mrcnn3d_cpu {

// RoIAlign: features [entries, extent, channels] to values [rois, bins, channels]; transposed: the way back.
enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16_TO_FLOAT32, TYPES };
struct RoIAlignCall {
  const void* input;
  const void* boxes;  // [rois, 6], of the output's type
  const int64_t* batch_index;
  void* output;
  int64_t rois, entries, channels;
  int64_t extent[3], bins[3], samples;
  double scale[3];
  int64_t type, is_transposed, threads;
};

// Greedy suppression of boxes [count, 6] that come best first; `kept` has room for min(count, max_keep) positions.
struct NMSCall {
  const float* boxes;
  const int64_t* groups;  // [count], or none
  int64_t* kept;
  int64_t count, max_keep;
  double threshold;
  int64_t threads;
};

// Masks [count, cells], best first, stretched over their boxes [count, 6] into the label volume [extent].
struct PasteCall {
  const float* masks;
  const double* boxes;
  const int32_t* labels;
  int32_t* volume;
  int64_t count;
  int64_t cells[3], extent[3];
  double threshold;
  int64_t threads;
};

// A RoIAlign call cut into tasks: each RoI or, transposed, each slab of `planes` z planes of each entry (the last of an
// entry may be thinner), times `slices` ranges of `slice` channels (the last may be narrower).
struct RoIAlignPlan {
  RoIAlignCall call;
  const int64_t* order;  // of the RoIs among the tasks; not transposed
  int64_t planes, slice, slices;
};

// Kept boxes column by column, in whole groups of LANES: unused lanes have a volume that is not a number.
constexpr int64_t LANES = 16;
struct KeptBoxes {
  float* corners[6];
  float* volume;
  int32_t* group_low;  // the halves of the 64-bit groups, as wide as the floats beside them; or none
  int32_t* group_high;
};

struct Candidate {
  float corners[6];
  float volume;
  int32_t group_low, group_high;
};

// Voxels [first, stop) whose centre a mask's box holds; nothing to paint if stop <= first along an axis.
struct VoxelRange {
  int64_t first[3], stop[3];
};

struct PastePlan {
  PasteCall call;
  const VoxelRange* ranges;
  int64_t planes;  // of the volume, per task
};

struct RoIAlignKernels {
  size_t (*scratch_bytes)(const RoIAlignPlan&);
  void (*run)(const RoIAlignPlan&, int64_t task, void* scratch);
};

struct Kernels {
  const char* name;
  RoIAlignKernels roi_align[TYPES];
  bool (*hits)(const KeptBoxes&, int64_t first, int64_t stop, const Candidate&, float threshold);
  size_t (*paste_scratch_bytes)(const PastePlan&);
  void (*paste)(const PastePlan&, int64_t task, void* scratch);
};

extern const Kernels baseline_kernels;
#if MRCNN3D_WITH_AVX2
extern const Kernels avx2_kernels;
#endif

}  // namespace mrcnn3d_cpu
