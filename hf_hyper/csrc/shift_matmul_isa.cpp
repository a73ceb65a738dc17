// Choice of the product kernels. They need more of a machine than the tables of isa.h (VNNI and VBMI2, FMA), so a set
// that lacks it takes the next best one.
#include <cstring>

#include "isa.h"
#include "shift_matmul_steps.h"

namespace hyper {

extern const MatmulSteps kMatmulAvx512, kMatmulAvx2, kMatmulNeon, kMatmulScalar;

namespace {

#if defined(HYPER_X86)
const MatmulSteps& best_x86(bool wide) {
  static const bool has_avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wide && has_avx512) return kMatmulAvx512;
  return has_avx2 ? kMatmulAvx2 : kMatmulScalar;
}
#endif

}  // namespace

const MatmulSteps& matmul_steps() {
  const char* name = kernels().name;
  if (std::strcmp(name, "scalar") == 0) return kMatmulScalar;
#if defined(HYPER_X86)
  return best_x86(std::strcmp(name, "avx512") == 0);
#elif defined(HYPER_ARM64)
  return kMatmulNeon;
#else
  return kMatmulScalar;
#endif
}

}  // namespace hyper
