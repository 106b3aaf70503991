// The exported functions: plain C, called by _cpu.py through ctypes. Nothing here knows Python or PyTorch; the one
// thing borrowed from the latter is its thread pool, through a pointer. No exception crosses this boundary.
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common.h"
#include "cpu_kernels.h"

#if MRCNN3D_WITH_AVX2
#include <cpuid.h>
#endif

#if defined(_WIN32)
#define MRCNN3D_EXPORT extern "C" __declspec(dllexport)
#else
#define MRCNN3D_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace mrcnn3d_cpu {
namespace {

constexpr int32_t ABI = 1;
constexpr int32_t OUT_OF_MEMORY = 1;

// ------------------------------------------------------------------------------------------------ instruction set

const Kernels* best_kernels() {
#if MRCNN3D_WITH_AVX2
  constexpr unsigned OSXSAVE_AND_AVX = 1u << 27 | 1u << 28, AVX2 = 1u << 5, XMM_AND_YMM = 6;
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c & OSXSAVE_AND_AVX) == OSXSAVE_AND_AVX) {
    unsigned saved_low, saved_high;  // registers that the operating system keeps for each thread
    __asm__ volatile("xgetbv" : "=a"(saved_low), "=d"(saved_high) : "c"(0));
    if ((saved_low & XMM_AND_YMM) == XMM_AND_YMM && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & AVX2))
      return &avx2_kernels;
  }
#endif
  return &baseline_kernels;
}

std::atomic<bool> baseline_forced{false};

const Kernels& kernels() {
  static const Kernels* const best = best_kernels();
  return baseline_forced ? baseline_kernels : *best;
}

// ------------------------------------------------------------------------------------------------ threads

// torch_parallel_for of PyTorch 2.10 and later.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context);
std::atomic<ParallelFor> pool{nullptr};

// Tasks that threads take one by one: which thread runs which, and how many there are, does not matter.
struct Job {
  void (*run)(const void* body, int64_t task, void* scratch);
  const void* body;
  int64_t tasks;
  size_t scratch_bytes;
  std::atomic<int64_t> next;
};

// Takes tasks until none is left; takes none where there is no memory to do them.
void work(Job* job) {
  constexpr size_t LINE = 64;
  if (job->next >= job->tasks || job->scratch_bytes > SIZE_MAX - LINE) return;
  const std::unique_ptr<void, decltype(&free)> block(malloc(job->scratch_bytes + LINE), &free);
  if (!block) return;
  void* const scratch = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block.get()) + LINE) & ~(LINE - 1));
  for (int64_t task; (task = job->next++) < job->tasks;) job->run(job->body, task, scratch);
}

void work_in_pool(int64_t, int64_t, void* job) { work(static_cast<Job*>(job)); }

void work_in_threads(Job* job, int64_t helpers) {
  std::vector<std::thread> threads;
  try {
    threads.reserve(size_t(helpers));
    while (int64_t(threads.size()) < helpers) threads.emplace_back(work, job);
  } catch (...) {
    // Fewer threads than hoped for: those that have started and this one do all tasks.
  }
  work(job);
  for (std::thread& thread : threads) thread.join();
}

// Calls body(task, scratch) for each task, each thread with its own scratch memory.
template <typename Body>
int32_t run_tasks(int64_t tasks, size_t scratch_bytes, int64_t threads, const Body& body) {
  const auto run = [](const void* typed, int64_t task, void* scratch) {
    const Body& run_one = *static_cast<const Body*>(typed);
    run_one(task, scratch);
  };
  Job job{run, &body, tasks, scratch_bytes, {0}};
  threads = std::min(threads, tasks);
  const ParallelFor parallel_for = pool;
  if (threads > 1 && parallel_for)
    parallel_for(0, threads, 1, work_in_pool, &job);
  else if (threads > 1)
    work_in_threads(&job, threads - 1);
  work(&job);  // all of it, or what is left should the pool have failed
  return job.next >= tasks ? 0 : OUT_OF_MEMORY;
}

// Waking threads, and waiting for the last of them on a busy machine, pays from a fraction of a millisecond on.
int64_t threads_for(int64_t operations, int64_t threads) { return operations < 1 << 20 ? 1 : threads; }

// The page faults of fresh memory can cost more than what is written there. Where huge pages are had for the asking,
// ask: inside the output only, all of which will be written.
void prefer_huge_pages(void* output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + uintptr_t(bytes)) & ~(PAGE - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)output, (void)bytes;
#endif
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t product(const int64_t (&three)[3]) { return three[0] * three[1] * three[2]; }

// ------------------------------------------------------------------------------------------------ roi align

constexpr int64_t TASKS_PER_THREAD = 4;

// Z planes in a slab: as many as fit the cache together, as every RoI is weighed again for each slab; but few enough
// for the threads all to be busy.
int64_t planes_of_a_slab(const RoIAlignCall& call, int64_t item, int64_t threads) {
  constexpr int64_t CACHE = 1 << 22;
  const int64_t plane = call.extent[1] * call.extent[2] * call.channels * item;
  const int64_t slabs = threads > 1 ? divide_up(TASKS_PER_THREAD * threads, call.entries) : 1;
  return std::clamp(call.extent[0] / slabs, int64_t(1), std::max(int64_t(1), CACHE / plane));
}

// The bits of a number below 2^20, each followed by two zeros.
uint64_t spread_bits(uint64_t number) {
  uint64_t spread = 0;
  for (int bit = 0; bit < 20; ++bit) spread |= (number >> bit & 1) << 3 * bit;
  return spread;
}

// Where the middle of a RoI lies, as a number that is near for near RoIs (Morton 1966).
template <typename T>
uint64_t place_of(const RoIAlignCall& call, int64_t roi) {
  constexpr double MOST = (1 << 20) - 1;
  const T* const box = static_cast<const T*>(call.boxes) + roi * 6;
  uint64_t place = 0;
  for (int a = 0; a < 3; ++a) {
    const double middle = (double(box[a]) + double(box[a + 3])) / 2 * call.scale[a];
    place |= spread_bits(middle > 0 ? uint64_t(std::min(middle, MOST)) : 0) << a;
  }
  return place;
}

// RoIs from neighbour to neighbour, which finds much of what they see still in the cache.
std::vector<int64_t> spatial_order(const RoIAlignCall& call) {
  std::vector<std::pair<uint64_t, int64_t>> places;
  for (int64_t roi = 0; roi < call.rois; ++roi)
    places.emplace_back(call.type == FLOAT64 ? place_of<double>(call, roi) : place_of<float>(call, roi), roi);
  std::sort(places.begin(), places.end());
  std::vector<int64_t> order;
  for (const auto& place : places) order.push_back(place.second);
  return order;
}

int32_t roi_align(const RoIAlignCall& call) {
  constexpr int64_t OPERATIONS_PER_VALUE = 16, NARROWEST = 64;
  const int64_t item = call.type == FLOAT64 ? sizeof(double) : sizeof(float);
  const int64_t values = call.rois * product(call.bins) * call.channels;
  const int64_t outputs = call.is_transposed ? call.entries * product(call.extent) * call.channels : values;
  if (outputs == 0) return 0;
  prefer_huge_pages(call.output, outputs * item);
  const int64_t threads = threads_for(values * OPERATIONS_PER_VALUE + outputs, call.threads);
  const int64_t planes = call.is_transposed ? planes_of_a_slab(call, item, threads) : 1;
  const int64_t units = call.is_transposed ? call.entries * divide_up(call.extent[0], planes) : call.rois;
  // Channels are cut only for want of other tasks: long runs of memory are read much faster than short ones.
  const int64_t wanted_slices = threads > 1 ? divide_up(2 * threads, units) : 1;
  const int64_t slice = NARROWEST * divide_up(call.channels, wanted_slices * NARROWEST);
  const std::vector<int64_t> order = call.is_transposed ? std::vector<int64_t>() : spatial_order(call);
  const RoIAlignPlan plan{call, order.data(), planes, slice, divide_up(call.channels, slice)};
  const RoIAlignKernels& kernel = kernels().roi_align[call.type];
  return run_tasks(units * plan.slices, kernel.scratch_bytes(plan), threads,
                   [&](int64_t task, void* scratch) { kernel.run(plan, task, scratch); });
}

// ------------------------------------------------------------------------------------------------ nms

Candidate candidate_at(const NMSCall& call, int64_t row) {
  Candidate one;
  std::copy_n(call.boxes + row * 6, 6, one.corners);
  one.volume = mrcnn3d::box_volume(one.corners);
  const uint64_t group = call.groups ? uint64_t(call.groups[row]) : 0;
  one.group_low = int32_t(uint32_t(group));
  one.group_high = int32_t(uint32_t(group >> 32));
  return one;
}

// Space cut into slabs along the axis where boxes are shortest for it. Boxes that overlap lie in a slab together, so a
// candidate meets the kept boxes of its own slabs only; the others could not suppress it.
class Slabs {
 public:
  struct Range {
    int64_t first, stop;
    bool has(int64_t slab) const { return first <= slab && slab < stop; }
  };

  explicit Slabs(const NMSCall& call) {
    constexpr int64_t WORTH_IT = 1024;  // boxes, below which looking at all of them first takes too long
    for (int axis = 0; axis < 3 && call.count >= WORTH_IT; ++axis) consider(call, axis);
  }

  int64_t count() const { return count_; }

  Range of(const Candidate& one) const {
    const int64_t first = slab_at(one.corners[axis_]), last = slab_at(one.corners[axis_ + 3]);
    return {first, std::max(first, last) + 1};
  }

 private:
  // Slabs as thick as the mean box, if that gives more of them than the axes before.
  void consider(const NMSCall& call, int axis) {
    constexpr double MOST = 64;
    double low = INFINITY, high = -INFINITY, sides = 0;
    int64_t finite = 0;
    for (int64_t row = 0; row < call.count; ++row) {
      const double from = call.boxes[row * 6 + axis], to = call.boxes[row * 6 + axis + 3];
      if (!isfinite(from) || !isfinite(to)) continue;
      low = std::min(low, from);
      high = std::max(high, to);
      sides += fabs(to - from);
      ++finite;
    }
    if (!(high > low)) return;
    const double slabs = std::min(MOST, floor((high - low) * double(finite) / sides));
    if (!(slabs > double(count_))) return;
    axis_ = axis;
    low_ = low;
    per_voxel_ = slabs / (high - low);
    count_ = int64_t(slabs);
  }

  int64_t slab_at(float position) const {
    const double slab = (double(position) - low_) * per_voxel_;  // outside, or no number: at an end
    return slab > 0 ? int64_t(std::min(slab, double(count_ - 1))) : 0;
  }

  int axis_ = 0;
  double low_ = 0, per_voxel_ = 0;
  int64_t count_ = 1;
};

class KeptList {
 public:
  explicit KeptList(bool grouped) : grouped_(grouped) {}

  // Rows, the unused lanes of the last group among them, and where that group begins (or the next, if it is full).
  int64_t stop() const { return LANES * divide_up(count_, LANES); }
  int64_t last_group() const { return count_ / LANES * LANES; }

  KeptBoxes boxes() {
    KeptBoxes view;
    for (int k = 0; k < 6; ++k) view.corners[k] = corners_[k].data();
    view.volume = volume_.data();
    view.group_low = grouped_ ? group_low_.data() : nullptr;
    view.group_high = grouped_ ? group_high_.data() : nullptr;
    return view;
  }

  void add(const Candidate& one) {
    if (count_ % LANES == 0) add_lanes();
    for (int k = 0; k < 6; ++k) corners_[k][count_] = one.corners[k];
    volume_[count_] = one.volume;
    if (grouped_) {
      group_low_[count_] = one.group_low;
      group_high_[count_] = one.group_high;
    }
    ++count_;
  }

 private:
  void add_lanes() {
    const size_t size = size_t(count_ + LANES);
    for (std::vector<float>& column : corners_) column.resize(size);
    volume_.resize(size, std::numeric_limits<float>::quiet_NaN());
    if (grouped_) {
      group_low_.resize(size);
      group_high_.resize(size);
    }
  }

  bool grouped_;
  int64_t count_ = 0;
  std::vector<float> corners_[6], volume_;
  std::vector<int32_t> group_low_, group_high_;
};

// The kept boxes, slab by slab.
struct KeptInSlabs {
  Slabs slabs;
  std::vector<KeptList> lists;
  int64_t count = 0;

  explicit KeptInSlabs(const NMSCall& call)
      : slabs(call), lists(size_t(slabs.count()), KeptList(call.groups != nullptr)) {}

  void add(const Candidate& one, Slabs::Range range) {
    for (int64_t slab = range.first; slab < range.stop; ++slab) lists[size_t(slab)].add(one);
    ++count;
  }
};

// Some candidates, best first, in which slabs they lie, and which of them are suppressed.
struct Block {
  std::vector<Candidate> candidates;
  std::vector<Slabs::Range> ranges;
  std::vector<char> suppressed;
};

Block read_block(const NMSCall& call, const Slabs& slabs, int64_t first, int64_t stop) {
  Block block;
  for (int64_t row = first; row < stop; ++row) {
    block.candidates.push_back(candidate_at(call, row));
    block.ranges.push_back(slabs.of(block.candidates.back()));
  }
  block.suppressed.assign(size_t(stop - first), 0);
  return block;
}

// Marks those of the candidates [first, stop) that a kept box of one slab hits. They walk it together, in pieces that
// stay in the cache.
void suppress_in_slab(Block& block, int64_t first, int64_t stop, KeptInSlabs& kept, int64_t slab, float threshold) {
  constexpr int64_t PIECE = 1024;
  KeptList& list = kept.lists[size_t(slab)];
  const KeptBoxes boxes = list.boxes();
  for (int64_t piece = 0; piece < list.stop(); piece += PIECE) {
    const int64_t end = std::min(list.stop(), piece + PIECE);
    for (int64_t i = first; i < stop; ++i)
      if (!block.suppressed[i] && block.ranges[i].has(slab))
        block.suppressed[i] = kernels().hits(boxes, piece, end, block.candidates[i], threshold);
  }
}

// Marks the candidates that a kept box hits. Threads share the candidates.
int32_t suppress_by_kept(Block& block, KeptInSlabs& kept, float threshold, int64_t threads) {
  constexpr int64_t AT_ONCE = 32;
  const int64_t count = int64_t(block.candidates.size());
  return run_tasks(divide_up(count, AT_ONCE), 0, threads_for(count * kept.count, threads), [&](int64_t task, void*) {
    const int64_t first = task * AT_ONCE, stop = std::min(count, first + AT_ONCE);
    for (int64_t slab = 0; slab < kept.slabs.count(); ++slab)
      suppress_in_slab(block, first, stop, kept, slab, threshold);
  });
}

// Decides about the rest of a block of candidates from row `first` on, one after the other.
void suppress_among_themselves(const NMSCall& call, int64_t first, const Block& block, KeptInSlabs& kept) {
  std::vector<int64_t> before;  // where in each slab the boxes of this block begin, and a few others
  for (const KeptList& list : kept.lists) before.push_back(list.last_group());
  const auto is_hit = [&](size_t i) {
    for (int64_t slab = block.ranges[i].first; slab < block.ranges[i].stop; ++slab) {
      KeptList& list = kept.lists[size_t(slab)];
      const int64_t begin = before[size_t(slab)];
      if (kernels().hits(list.boxes(), begin, list.stop(), block.candidates[i], float(call.threshold))) return true;
    }
    return false;
  };
  for (size_t i = 0; i < block.candidates.size() && kept.count < call.max_keep; ++i) {
    if (block.suppressed[i] || is_hit(i)) continue;
    call.kept[kept.count] = first + int64_t(i);
    kept.add(block.candidates[i], block.ranges[i]);
  }
}

int32_t suppress(const NMSCall& call, int64_t* found) {
  constexpr int64_t BLOCK = 512;
  KeptInSlabs kept(call);
  for (int64_t first = 0; first < call.count && kept.count < call.max_keep; first += BLOCK) {
    Block block = read_block(call, kept.slabs, first, std::min(call.count, first + BLOCK));
    if (const int32_t failed = suppress_by_kept(block, kept, float(call.threshold), call.threads)) return failed;
    suppress_among_themselves(call, first, block, kept);
  }
  *found = kept.count;
  return 0;
}

// ------------------------------------------------------------------------------------------------ paste masks

// Voxels whose centre lies in a box; compared as floating point, as a box may lie anywhere.
VoxelRange covered(const double* box, const int64_t (&extent)[3]) {
  VoxelRange range{};
  for (int a = 0; a < 6; ++a)
    if (!isfinite(box[a])) return range;
  for (int a = 0; a < 3; ++a) {
    const double first = std::max(0.0, ceil(box[a] - 0.5)), stop = std::min(double(extent[a]), ceil(box[a + 3] - 0.5));
    if (!(first < stop)) return VoxelRange{};
    range.first[a] = int64_t(first);
    range.stop[a] = int64_t(stop);
  }
  return range;
}

int32_t paste_masks(const PasteCall& call) {
  constexpr int64_t MOST_PLANES = 16;
  const int64_t voxels = product(call.extent), threads = threads_for(voxels, call.threads);
  prefer_huge_pages(call.volume, voxels * int64_t(sizeof(int32_t)));
  std::vector<VoxelRange> ranges;
  ranges.reserve(size_t(call.count));
  for (int64_t k = 0; k < call.count; ++k) ranges.push_back(covered(call.boxes + k * 6, call.extent));
  const int64_t tasks = TASKS_PER_THREAD * threads;
  const int64_t planes = std::clamp(divide_up(call.extent[0], tasks), int64_t(1), MOST_PLANES);
  const PastePlan plan{call, ranges.data(), planes};
  const Kernels& kernel = kernels();
  return run_tasks(divide_up(call.extent[0], plan.planes), kernel.paste_scratch_bytes(plan), threads,
                   [&](int64_t task, void* scratch) { kernel.paste(plan, task, scratch); });
}

// Runs a function that may run out of memory.
template <typename Function>
int32_t guarded(const Function& function) {
  try {
    return function();
  } catch (...) {
    return OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace mrcnn3d_cpu

using namespace mrcnn3d_cpu;

// ------------------------------------------------------------------------------------------------ exported

MRCNN3D_EXPORT const char* mrcnn3d_signature() { return "napari-mrcnn3d ops"; }

MRCNN3D_EXPORT int32_t mrcnn3d_abi() { return ABI; }

MRCNN3D_EXPORT const char* mrcnn3d_instruction_set() { return kernels().name; }

MRCNN3D_EXPORT void mrcnn3d_force_baseline(int32_t forced) { baseline_forced = forced != 0; }

MRCNN3D_EXPORT void mrcnn3d_use_pool(void* parallel_for) { pool = reinterpret_cast<ParallelFor>(parallel_for); }

// 0, or 1 if memory ran out; so the others.
MRCNN3D_EXPORT int32_t mrcnn3d_roi_align(const RoIAlignCall* call) {
  return guarded([&] { return roi_align(*call); });
}

MRCNN3D_EXPORT int32_t mrcnn3d_nms(const NMSCall* call, int64_t* found) {
  return guarded([&] { return suppress(*call, found); });
}

MRCNN3D_EXPORT int32_t mrcnn3d_paste_masks(const PasteCall* call) {
  return guarded([&] { return paste_masks(*call); });
}
