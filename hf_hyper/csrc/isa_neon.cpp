#include "isa.h"
#include "shift_steps_inl.h"
#include "simd/neon.h"

namespace hyper {
const Kernels kNeonKernels = {"neon", shift_steps<Neon, Neon>()};
}
