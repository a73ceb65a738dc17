#include "isa.h"
#include "shift_steps_inl.h"
#include "simd/avx512.h"

namespace hyper {
const Kernels kAvx512Kernels = {"avx512", shift_steps<Avx512, Avx512>()};
}
