// The kernels for the instruction set that the including file has switched on. It also defines MRCNN3D_KERNELS (the
// table to fill), MRCNN3D_KERNELS_NAME, and MRCNN3D_PACK_BYTES (the width of a register).

// All of it, common.h included, goes into an unnamed namespace and nothing comes from the C++ library: of an inline
// function that several files share the linker keeps any one copy, and could give AVX2 code to the baseline.
#include <string.h>

#include "cpu_kernels.h"

namespace mrcnn3d_cpu {
namespace {

#include "common.h"

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cuts one block of memory into pieces, each on a cache line of its own; without a block it only measures.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)), used_(0) {}

  template <typename Item>
  Item* take(int64_t count) {
    constexpr int64_t SIZE = sizeof(Item), LINE = 64;
    const int64_t at = used_, bytes = SIZE * smaller(count, MOST / SIZE);
    used_ = smaller(MOST, at + (bytes + LINE - 1) / LINE * LINE);
    return block_ ? reinterpret_cast<Item*>(block_ + at) : nullptr;
  }

  // More than can be had, rather than less than is needed, once sizes are beyond all measure.
  size_t used() const { return used_ < MOST ? size_t(used_) : SIZE_MAX; }

 private:
  static constexpr int64_t MOST = int64_t(1) << 46;
  char* block_;
  int64_t used_;
};

#include "cpu_roi_align.inl"

#include "cpu_nms.inl"

#include "cpu_paste_masks.inl"

}  // namespace

const Kernels MRCNN3D_KERNELS = {
    MRCNN3D_KERNELS_NAME,
    {{roi_align_scratch_bytes<float>, roi_align_task<float, float>},
     {roi_align_scratch_bytes<double>, roi_align_task<double, double>},
     {roi_align_scratch_bytes<float>, roi_align_task<float, BFloat16>}},
    hits_kept,
    paste_scratch_bytes,
    paste_task,
};

}  // namespace mrcnn3d_cpu
