// Choice of the product kernels. They need more of a machine than the tables of isa.h (VNNI, VBMI and VBMI2; FMA), so a set
// that lacks it takes the next best one.
#include <cstring>

#include "isa.h"
#include "dense_steps.h"
#include "shift_matmul_steps.h"

namespace hyper {

extern const MatmulSteps kMatmulAvx512, kMatmulAvx2, kMatmulNeon, kMatmulScalar;
extern const DenseSteps kDenseAvx512;
extern const DecodeWinding kDecodeWindingAvx512[2];

namespace {

#if defined(HYPER_X86)
const MatmulSteps& best_x86(bool wide) {
  static const bool has_avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                                 __builtin_cpu_supports("avx512vbmi2");
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

const DenseSteps* dense_steps() {
#if defined(HYPER_X86)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  if (supported && &matmul_steps() == &kMatmulAvx512) return &kDenseAvx512;
#endif
  return nullptr;
}

const DecodeWinding* winding_panels() {
#if defined(HYPER_X86)
  return kDecodeWindingAvx512;
#else
  return nullptr;
#endif
}

int64_t dense_tokens() {
  if (dense_steps() == nullptr) return 0;
#if defined(HYPER_X86)
  // Matrix units, which only the host library uses, win once there are enough tokens to fill them.
  if (__builtin_cpu_supports("amx-bf16")) return 64;
#endif
  return INT64_MAX;
}

}  // namespace hyper
