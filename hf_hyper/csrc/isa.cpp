#include "isa.h"

#include <atomic>
#include <cstring>

namespace hyper {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first.
const Candidate kCandidates[] = {
#if defined(HYPER_X86)
    {&kAvx512Kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {&kAvx2Kernels, [] { return static_cast<bool>(__builtin_cpu_supports("avx2")); }},
#elif defined(HYPER_ARM64)
    {&kNeonKernels, [] { return true; }},
#endif
    {&kScalarKernels, [] { return true; }},
};

const Kernels* best() {
  for (const Candidate& candidate : kCandidates) {
    if (candidate.supported()) return candidate.kernels;
  }
  return &kScalarKernels;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{best()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool select_kernels(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    current().store(best());
    return true;
  }
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(candidate.kernels->name, name) == 0 && candidate.supported()) {
      current().store(candidate.kernels);
      return true;
    }
  }
  return false;
}

}  // namespace hyper
