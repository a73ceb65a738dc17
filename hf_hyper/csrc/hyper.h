// Plain C interface of the compiled core: pointers, 64-bit sizes, int results.
//
// Every function that can fail returns HYPER_OK or a negative HYPER_ERROR_*. Arrays are C-contiguous. `threads` is
// the number of threads to work on the call, at least 1; results never depend on it, nor on the instruction set.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define HYPER_API __declspec(dllexport)
#else
#define HYPER_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  HYPER_OK = 0,
  HYPER_ERROR_ARGUMENT = -1,    // a size, rate or pointer outside its documented range
  HYPER_ERROR_NON_FINITE = -2,  // an input weight is NaN or infinite
  HYPER_ERROR_MEMORY = -3,      // workspace could not be allocated
  HYPER_ERROR_ISA = -4,         // this machine or this build lacks the instruction set asked for
};

// Raised whenever a signature or its meaning changes; the Python loader refuses any other number.
HYPER_API int hyper_abi_version(void);

// Instruction set in use: "avx512", "avx2", "neon" or "scalar". The best one is chosen at the first call.
HYPER_API const char* hyper_isa(void);

// Uses the named instruction set from now on ("auto": the best one). Not to be called while other calls run.
HYPER_API int hyper_set_isa(const char* name);

// Encodes tiles of 256 weights as circular bit strings of `shift`, format 1.
//   tiles          [n, 256] float32, weights in units of value(state), whose variance is one
//   bits           bits per weight, 1..8
//   survivor_bits  search effort, 8..16: about 2^survivor_bits evaluations a weight; 16 is the full search.
//                  Less than min(16, 2 * bits) is raised to it.
//   multiplier     the odd constant of the observable
//   codes          [n, 8 * bits] uint32
HYPER_API int hyper_shift_encode(const float* tiles, int64_t n, int bits, int survivor_bits, uint32_t multiplier,
                                 int threads, uint32_t* codes);

// The same search for any other observable, given as the byte sum (0..1020) of each of the 65536 states.
HYPER_API int hyper_shift_encode_observable(const float* tiles, int64_t n, int bits, int survivor_bits,
                                            const uint16_t* byte_sums, int threads, uint32_t* codes);

// Decodes: codes [n, 8 * bits] -> tiles [n, 256] float32, in units of value(state).
HYPER_API int hyper_shift_decode(const uint32_t* codes, int64_t n, int bits, uint32_t multiplier, int threads,
                                 float* tiles);

// Nearest node of `winding` for every point, by squared distance in float32; the lowest index on a tie.
//   points     [n, 2] float32, of magnitude up to 1e18
//   nodes      [num_nodes, 2] float32, as large; 1 <= num_nodes < 2^31
//   index      [n] int32
HYPER_API int hyper_winding_nearest(const float* points, int64_t n, const float* nodes, int64_t num_nodes, int threads,
                                    int32_t* index);

#ifdef __cplusplus
}
#endif
