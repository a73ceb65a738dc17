// Products of activations with a weight stored as `winding` without incoherence. Arguments as in hyper.h, checked.
#pragma once

#include <cstdint>

#include "hyper.h"

namespace hyper {

void multiply_winding(const hyper_winding_plan& plan, const uint32_t* codes, const float* centre,
                      const float* shell_side, const void* x, int dtype, int64_t tokens, int threads, void* y);

// False where dense_steps() is null.
bool multiply_winding_dense(const hyper_winding_plan& plan, const uint32_t* codes, const float* centre,
                            const float* shell_side, const void* x, int dtype, int64_t tokens, int threads, void* y);

void decode_winding(const hyper_winding_plan& plan, const uint32_t* codes, const float* centre,
                    const float* shell_side, int64_t first_row, int64_t rows, int threads, void* weights, int dtype);

}  // namespace hyper
