// What kernels ask of the compiler beyond the language.
#pragma once

#define HYPER_INLINE inline __attribute__((always_inline))
#define HYPER_INLINE_LAMBDA __attribute__((always_inline))
#define HYPER_OUTLINE __attribute__((noinline))
#if defined(__clang__)
#define HYPER_UNROLL _Pragma("unroll")
#else
#define HYPER_UNROLL _Pragma("GCC unroll 16")
#endif
