// The kernels, for the instruction set that the including file has switched on and named in MRCNN3D_KERNELS.
//
// All of it, common.h included, goes into an unnamed namespace and nothing comes from the C++ library: of an inline
// function that several files share the linker keeps any one copy, and could give AVX2 code to the baseline.
#include <string.h>

#include "cpu_kernels.h"

namespace mrcnn3d_cpu {
namespace {

#include "common.h"
//
#include "cpu_roi_align.inl"
//
#include "cpu_nms.inl"
//
#include "cpu_paste_masks.inl"

}  // namespace

const Kernels MRCNN3D_KERNELS = {
    MRCNN3D_KERNELS_NAME,
    {{roi_align_scratch_bytes<float>, roi_align_task<float>},
     {roi_align_scratch_bytes<double>, roi_align_task<double>}},
    hits_kept,
    paste_scratch_bytes,
    paste_task,
};

}  // namespace mrcnn3d_cpu
