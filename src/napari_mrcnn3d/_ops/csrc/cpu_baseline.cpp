// The kernels for every processor of the family that the library is built for.
#define MRCNN3D_KERNELS baseline_kernels
#define MRCNN3D_KERNELS_NAME "baseline"
#define MRCNN3D_PACK_BYTES 16
#include "cpu_kernels.inl"
