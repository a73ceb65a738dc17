// Products of activations with a weight stored as `shift` with incoherence. Arguments as in hyper.h, already checked.
#pragma once

#include <cstdint>

#include "hyper.h"

namespace hyper {

void multiply_shift(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale,
                    const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, bool int8, int threads,
                    void* y);

// False where dense_steps() is null.
bool multiply_shift_dense(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale,
                          const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, bool int8, int threads,
                          void* y);

void rotate_tokens(const hyper_shift_plan& plan, const void* x, int dtype, int64_t tokens, int threads, void* rotated,
                   int rotated_dtype, float* sums);

void decode_rows(const hyper_shift_plan& plan, const uint32_t* codes, int64_t first_tile, int64_t tiles, int threads,
                 void* rows, int rows_dtype);

void decode_weight(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale, const uint16_t* out_scale,
                   int threads, void* weight, int dtype);

void finish_tokens(const hyper_shift_plan& plan, const void* product, int product_dtype, int64_t first_tile,
                   int64_t tiles, const float* sums, const uint16_t* scale, const uint16_t* out_scale, int64_t tokens,
                   int threads, void* y, int dtype);

}  // namespace hyper
