// Plain C interface of the compiled core: pointers, 64-bit sizes, int results.
//
// Every function that can fail returns HYPER_OK or a negative HYPER_ERROR_*. Arrays are C-contiguous. `threads` is
// the number of threads to work on the call, at least 1 (beyond 256 counts as 256); results never depend on it, and only
// products of activations and weights rotated back depend on the instruction set.
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
  HYPER_ERROR_INTERNAL = -5,    // anything else; a bug
  HYPER_ERROR_ISA = -4,         // this machine or this build lacks the instruction set asked for
};

// Raised whenever a signature or its meaning changes; the Python loader refuses any other number.
HYPER_API int hyper_abi_version(void);

// Instruction set in use: "avx512", "avx2", "neon" or "scalar". The best one is chosen at the first call.
HYPER_API const char* hyper_isa(void);

// Uses the named instruction set from now on ("auto": the best one). Not to be called while other calls run.
HYPER_API int hyper_set_isa(const char* name);

// Whether hyper_set_isa would succeed; changes nothing.
HYPER_API int hyper_has_isa(const char* name);

// Instruction set of products of activations: a lesser one where the machine has only part of hyper_isa()'s family.
HYPER_API const char* hyper_matmul_isa(void);

// Runs all later calls on the threads of an OpenMP runtime that the process uses anyway: the address of its
// GOMP_parallel. Null: threads of our own. A forked child always uses its own.
HYPER_API void hyper_use_openmp(void* gomp_parallel);

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

enum { HYPER_FLOAT32 = 0, HYPER_BFLOAT16 = 1, HYPER_FLOAT16 = 2 };

// What all calls on one weight of `shift` with incoherence share; P and Q are its sides padded to multiples of 16. The
// pointers stay the caller's. Rotations are those of storage/FORMAT.md.
typedef struct hyper_shift_plan {
  int64_t out_features, in_features;
  int32_t bits;
  uint32_t multiplier;
  float mean_offset;        // mean of the byte sum over all states, less 510
  float inverse_deviation;  // of the byte sum over all states
  int32_t input_blocks;     // parts of the input side that are rotated separately
  int32_t output_block;     // rows that are rotated together: a power of two, 16..128
  int32_t num_factors;      // cosine transforms of a part of the input side, at most 32
  int32_t factors[32];      // their sizes, odd, 1..1023
  const float* cosines;     // their matrices, row-major, one after the other; only the first half of a row is read
  const float* scales_in;   // [Q], signs times p^-0.5, p the largest power of two that divides the width of a part
  const uint16_t* signs_in; // [Q] bfloat16, signs times the largest power of two up to p^-0.5
  const float* signs_out;   // [P] of +1 and -1
  const float* sum_weights; // [Q / p]: the values of rotated x add up to the sum of sum_weights[i] * x[i * p]
} hyper_shift_plan;

// y = x W^T straight from the stored tensors, for few tokens: every 8 tokens decode the weight once.
//   codes [P/16, Q/16, 8 * bits] uint32, scale [P] float16, out_scale [out_features] bfloat16
//   x     [tokens, in_features] of `dtype`, one of HYPER_FLOAT32, HYPER_BFLOAT16, HYPER_FLOAT16
//   int8  nonzero: rotated activations of a single token are rounded to 8 bits per 16 columns; no effect on more.
//         Otherwise those of 16-bit types may be rounded to 16 bits per token and 16 columns, about 2e-5 of error, and
//         float32 ones stay. Where columns are rounded, they count as zeros if none is above 1e-33.
//   y     [tokens, out_features] of `dtype`
// Results depend on the instruction set, in the last bits, but not on `threads`.
HYPER_API int hyper_shift_matmul(const hyper_shift_plan* plan, const uint32_t* codes, const uint16_t* scale,
                                 const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, int int8,
                                 int threads, void* y);

// The same for many tokens: every output tile is decoded once for up to 512 of them. Rotated activations and byte sums are
// rounded to bfloat16 or, where `int8`, to 8 bits, with one scale per token and up to 256 columns; numbers below 2e-36 may
// count as zeros. HYPER_ERROR_ISA where hyper_dense_tokens() is 0.
HYPER_API int hyper_shift_matmul_dense(const hyper_shift_plan* plan, const uint32_t* codes, const uint16_t* scale,
                                       const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, int int8,
                                       int threads, void* y);
// Most tokens for which the dense products are the fastest; 0 without dot products of bfloat16 pairs.
HYPER_API int64_t hyper_dense_tokens(void);

// For many tokens: y = finish(rotate(x) · decode_rows()^T), the product by a library for matrices.
//   rotated [tokens, Q], float32 or bfloat16; sums [tokens]: of each token's rotated values, before any rounding
HYPER_API int hyper_shift_rotate(const hyper_shift_plan* plan, const void* x, int dtype, int64_t tokens, int threads,
                                 void* rotated, int rotated_dtype, float* sums);
//   rows [16 * tiles, Q], float32 or bfloat16: byte sums less 510 of the output tiles from first_tile on
HYPER_API int hyper_shift_decode_rows(const hyper_shift_plan* plan, const uint32_t* codes, int64_t first_tile,
                                      int64_t tiles, int threads, void* rows, int rows_dtype);
//   product [tokens, 16 * tiles] of those output tiles, which are whole blocks of the output rotation; writes their
//   columns of y [tokens, out_features]
HYPER_API int hyper_shift_finish(const hyper_shift_plan* plan, const void* product, int product_dtype,
                                 int64_t first_tile, int64_t tiles, const float* sums, const uint16_t* scale,
                                 const uint16_t* out_scale, int64_t tokens, int threads, void* y, int dtype);

// The weight that the stored tensors stand for, rounded from float32 to `dtype`: [out_features, in_features]. Values beyond
// float32 are its largest ones.
HYPER_API int hyper_shift_decode_weight(const hyper_shift_plan* plan, const uint32_t* codes, const uint16_t* scale,
                                        const uint16_t* out_scale, int threads, void* weight, int dtype);

// Nearest node of `winding` for every point, by squared distance in float32; the lowest index on a tie.
//   points     [n, 2] float32, of magnitude up to 1e18
//   nodes      [num_nodes, 2] float32, as large; 1 <= num_nodes < 2^31
//   index      [n] int32
HYPER_API int hyper_winding_nearest(const float* points, int64_t n, const float* nodes, int64_t num_nodes, int threads,
                                    int32_t* index);

// What all calls on one weight of `winding` without incoherence share.
typedef struct hyper_winding_plan {
  int64_t out_features, in_features;
  int32_t width;       // bits of a code, 1..22
  int32_t num_points;  // of the orbit, at least 1
  int32_t num_shells;  // at least 1, (num_shells + 1) * (num_points + 1) <= 2^width
  uint32_t direction[2];
} hyper_winding_plan;

// y = x W^T straight from the stored tensors, for few tokens: every 8 tokens decode the weight once.
//   codes [out_features, words of a row] uint32, centre [2] float32, shell_side [num_shells + 1] float32
//   x     [tokens, in_features] of `dtype`, y [tokens, out_features] of `dtype`
// Sums are float32; they depend on the instruction set, in the last bits, but not on `threads`.
HYPER_API int hyper_winding_matmul(const hyper_winding_plan* plan, const uint32_t* codes, const float* centre,
                                   const float* shell_side, const void* x, int dtype, int64_t tokens, int threads,
                                   void* y);

// The same for many tokens: every weight is decoded once for up to 512 of them. Activations and weights are rounded to
// bfloat16. HYPER_ERROR_ISA where hyper_dense_tokens() is 0.
HYPER_API int hyper_winding_matmul_dense(const hyper_winding_plan* plan, const uint32_t* codes, const float* centre,
                                         const float* shell_side, const void* x, int dtype, int64_t tokens,
                                         int threads, void* y);

// Weights of some rows, rounded from float32 to `dtype`: [rows, in_features]. The same on every machine.
HYPER_API int hyper_winding_decode(const hyper_winding_plan* plan, const uint32_t* codes, const float* centre,
                                   const float* shell_side, int64_t first_row, int64_t rows, int threads,
                                   void* weights, int dtype);

#ifdef __cplusplus
}
#endif
