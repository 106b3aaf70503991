// Runs kernels of cuda_kernels.cuh by name, with their parameters as a launch of CUDA takes them: an array of pointers.
#include "cuda.h"

#include "cuda_kernels.cuh"

#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr std::size_t shared_limit = 48 * 1024, guard = 64, stack_size = 64 * 1024;

struct Thread {
  ucontext_t context;
  std::jmp_buf resume;
  bool started, finished, waiting;
};

// A barrier of `size` threads; the bits that they said, for those who come back from it.
struct Meeting {
  unsigned size, here;
  std::uint64_t said, heard;
};

std::vector<Thread> threads(1024);
std::vector<Meeting> warps(32);
Meeting block;
std::jmp_buf scheduler;
unsigned current, turns;
const std::function<void()>* body;
char* stacks;

// Give way to the scheduler until `meeting` is complete.
std::uint64_t meet(Meeting& meeting, unsigned first, unsigned count, bool said) {
  if (said) meeting.said |= std::uint64_t(1) << (current - first) % 64;
  if (++meeting.here == meeting.size) {
    meeting.heard = meeting.said;
    meeting.here = 0;
    meeting.said = 0;
    for (unsigned i = first; i < first + count; ++i) threads[i].waiting = false;
  } else {
    threads[current].waiting = true;
  }
  const unsigned self = current;
  if (_setjmp(threads[self].resume) == 0) _longjmp(scheduler, 1);
  return meeting.heard;
}

void enter() {
  (*body)();
  threads[current].finished = true;
  _longjmp(scheduler, 1);
}

void resume(unsigned index) {
  Thread& thread = threads[index];
  current = index;
  threadIdx = {index, 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stacks + index * stack_size;
  thread.context.uc_stack.ss_size = stack_size;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
  setcontext(&thread.context);
}

// Threads that have finished count as having met, as on recent cards.
void leave(unsigned index) {
  const unsigned warp = index / 32;
  --block.size;
  --warps[warp].size;
  for (Meeting* meeting : {&block, &warps[warp]}) {
    if (meeting->size == 0 || meeting->here < meeting->size) continue;
    meeting->heard = meeting->said;
    meeting->here = 0;
    meeting->said = 0;
    const bool whole = meeting == &block;
    for (unsigned i = whole ? 0 : warp * 32; i < (whole ? blockDim.x : warp * 32 + 32); ++i) threads[i].waiting = false;
  }
}

bool run_block() {
  const unsigned count = blockDim.x;
  block = {count, 0, 0, 0};
  for (unsigned i = 0; i < count; ++i) {
    threads[i].started = threads[i].finished = threads[i].waiting = false;
    warps[i / 32] = {0, 0, 0, 0};
  }
  for (unsigned i = 0; i < count; ++i) ++warps[i / 32].size;
  unsigned left = count;
  while (left > 0) {
    const unsigned before = left, round = turns++;
    bool moved = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned turned = (i + round * 37) % count, index = round % 2 ? count - 1 - turned : turned;
      Thread& thread = threads[index];
      if (thread.finished || thread.waiting) continue;
      moved = true;
      resume(index);
      if (thread.finished) {
        --left;
        leave(index);
      }
    }
    if (!moved && left == before) return false;  // all wait for each other
  }
  return true;
}

template <typename... A, std::size_t... I>
void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
  static_assert(((sizeof(A) == 8) && ...), "every parameter of a kernel has eight bytes");
  kernel(*static_cast<std::remove_const_t<A>*>(parameters[I])...);
}

using Launcher = std::function<void(void**)>;

template <typename... A>
Launcher launcher(void (*kernel)(A...)) {
  return [kernel](void** parameters) { call(kernel, parameters, std::index_sequence_for<A...>()); };
}

#define KERNEL(name) {#name, launcher(name)}
#define FLOATING(name)                                                                                 \
  KERNEL(name##_float32), KERNEL(name##_float32_wide), KERNEL(name##_float64), KERNEL(name##_float16), \
      KERNEL(name##_float16_wide), KERNEL(name##_bfloat16), KERNEL(name##_bfloat16_wide)

const std::map<std::string, Launcher> kernels = {
    FLOATING(roi_align),
    FLOATING(roi_align_scatter),
    FLOATING(roi_align_gather),
    KERNEL(roi_align_float32_widest),
    KERNEL(roi_align_gather_float32_widest),
    KERNEL(roi_align_taps_float32),
    KERNEL(roi_align_taps_float64),
    KERNEL(nms_drop),
    KERNEL(nms_compare),
    KERNEL(nms_keep),
    KERNEL(paste_ranks_float32),
    KERNEL(paste_ranks_float64),
    KERNEL(paste_labels),
};

}  // namespace

std::uint64_t meet_block(bool said) { return meet(block, 0, blockDim.x, said); }

std::uint64_t meet_warp(bool said) {
  const unsigned warp = current / 32, first = warp * 32;
  return meet(warps[warp], first, min(32u, blockDim.x - first), said);
}

namespace mrcnn3d {
double shared_memory[(shared_limit + guard) / sizeof(double)];
}

// 0, or what went wrong: 1 unknown kernel, 2 a size that no card takes, 3 threads that wait for each other forever,
// 4 more shared memory written than was asked for.
extern "C" int emulate(const char* name, unsigned grid_x, unsigned grid_y, unsigned block_size, unsigned shared,
                       void** parameters) {
  const auto found = kernels.find(name);
  if (found == kernels.end()) return 1;
  const bool fits = grid_x >= 1 && grid_x < (1u << 31) && grid_y >= 1 && grid_y < (1u << 16);
  if (!fits || block_size < 1 || block_size > 1024 || shared > shared_limit) return 2;
  if (stacks == nullptr) {
    stacks = static_cast<char*>(
        mmap(nullptr, 1024 * stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  const std::function<void()> run = [&] { found->second(parameters); };
  body = &run;
  gridDim = {grid_x, grid_y, 1};
  blockDim = {block_size, 1, 1};
  char* end = reinterpret_cast<char*>(mrcnn3d::shared_memory) + shared;
  for (unsigned y = 0; y < grid_y; ++y) {
    for (unsigned x = 0; x < grid_x; ++x) {
      blockIdx = {x, y, 0};
      std::memset(mrcnn3d::shared_memory, 0x5a, shared + guard);
      if (!run_block()) return 3;
      for (std::size_t i = 0; i < guard; ++i) {
        if (static_cast<unsigned char>(end[i]) != 0x5a) return 4;
      }
    }
  }
  return 0;
}
