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

const Kernels* find_kernels(const char* name) {
  if (std::strcmp(name, "auto") == 0) return best();
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(candidate.kernels->name, name) == 0 && candidate.supported()) return candidate.kernels;
  }
  return nullptr;
}

bool select_kernels(const char* name) {
  const Kernels* found = find_kernels(name);
  if (found != nullptr) current().store(found);
  return found != nullptr;
}

}  // namespace hyper
