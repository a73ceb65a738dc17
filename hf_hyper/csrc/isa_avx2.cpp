#include "isa.h"
#include "shift_steps_inl.h"
#include "simd/avx2.h"

namespace hyper {
const Kernels kAvx2Kernels = {"avx2", shift_steps<Avx2, Avx2>()};
}
