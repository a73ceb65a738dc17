#include "isa.h"
#include "shift_steps_inl.h"
#include "simd/portable.h"

namespace hyper {
const Kernels kScalarKernels = {"scalar", shift_steps<Portable, Portable>()};
}
