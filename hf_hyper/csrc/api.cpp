// Argument checks and exception barrier of the C interface.
#include <new>
#include <stdexcept>
#include <vector>

#include "hyper.h"
#include "isa.h"
#include "shift_decode.h"
#include "dense_steps.h"
#include "shift_encode.h"
#include "shift_matmul.h"
#include "shift_matmul_steps.h"
#include "shift_observable.h"
#include "thread_pool.h"
#include "winding.h"
#include "winding_product.h"

namespace {

template <class Body>
int guarded(Body body) {
  try {
    body();
    return HYPER_OK;
  } catch (const std::bad_alloc&) {
    return HYPER_ERROR_MEMORY;
  } catch (const std::length_error&) {
    return HYPER_ERROR_MEMORY;
  } catch (...) {
    return HYPER_ERROR_INTERNAL;
  }
}

int clamped(int threads) { return threads < hyper::kMaxThreads ? threads : hyper::kMaxThreads; }

bool in_range(const uint16_t* byte_sums) {
  for (int state = 0; state < hyper::kStates; ++state) {
    if (byte_sums[state] > hyper::kMaxByteSum) return false;
  }
  return true;
}

bool all_finite(const float* values, int64_t count) {
  // A NaN or an infinity makes 0 * value NaN, and NaN stays in the sum.
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += 0.0f * values[i];
  return sum == 0.0f;
}

bool valid(const hyper_shift_plan* plan) {
  if (plan == nullptr || plan->out_features < 1 || plan->in_features < 1 || plan->bits < 1 || plan->bits > 8 ||
      plan->multiplier % 2 == 0 || plan->input_blocks < 1 || plan->scales_in == nullptr ||
      plan->signs_in == nullptr || plan->signs_out == nullptr || plan->sum_weights == nullptr) {
    return false;
  }
  const int64_t rows = (plan->out_features + 15) / 16 * 16, columns = (plan->in_features + 15) / 16 * 16;
  const int32_t block = plan->output_block;
  if (block < 16 || block > 128 || (block & (block - 1)) != 0 || rows % block != 0) return false;
  if (columns % (16 * static_cast<int64_t>(plan->input_blocks)) != 0) return false;
  if (plan->num_factors < 0 || plan->num_factors > 32) return false;
  if (plan->num_factors > 0 && plan->cosines == nullptr) return false;
  int64_t inner = columns / plan->input_blocks;
  for (int f = 0; f < plan->num_factors; ++f) {
    const int32_t size = plan->factors[f];
    if (size < 1 || size > 1024 || size % 2 == 0 || inner % size != 0) return false;
    inner /= size;
  }
  return inner % 16 == 0;
}

bool valid(const hyper_winding_plan* plan) {
  if (plan == nullptr || plan->out_features < 1 || plan->in_features < 1 || plan->width < 1 ||
      plan->width > hyper::kMaxWindingWidth || plan->num_points < 1 || plan->num_shells < 1) {
    return false;
  }
  return (int64_t{plan->num_shells} + 1) * (int64_t{plan->num_points} + 1) <= int64_t{1} << plan->width;
}

bool valid_tiles(const hyper_shift_plan& plan, int64_t first, int64_t count) {
  return first >= 0 && count >= 0 && count <= (plan.out_features + 15) / 16 - first;
}

bool valid_dtype(int dtype) { return dtype >= HYPER_FLOAT32 && dtype <= HYPER_FLOAT16; }
bool wide_dtype(int dtype) { return dtype == HYPER_FLOAT32 || dtype == HYPER_BFLOAT16; }

}  // namespace

int hyper_abi_version(void) { return 8; }

const char* hyper_isa(void) { return hyper::kernels().name; }

int hyper_set_isa(const char* name) {
  if (name == nullptr) return HYPER_ERROR_ARGUMENT;
  return hyper::select_kernels(name) ? HYPER_OK : HYPER_ERROR_ISA;
}

int hyper_has_isa(const char* name) { return name != nullptr && hyper::find_kernels(name) != nullptr; }

const char* hyper_matmul_isa(void) { return hyper::matmul_steps().name; }

void hyper_use_openmp(void* gomp_parallel) { hyper::use_openmp(reinterpret_cast<hyper::GompParallel>(gomp_parallel)); }

int hyper_shift_encode_observable(const float* tiles, int64_t n, int bits, int survivor_bits,
                                  const uint16_t* byte_sums, int threads, uint32_t* codes) {
  if (n < 0 || bits < 1 || bits > 8 || survivor_bits < 8 || survivor_bits > 16 || threads < 1) {
    return HYPER_ERROR_ARGUMENT;
  }
  if (n == 0) return HYPER_OK;
  if (tiles == nullptr || codes == nullptr || byte_sums == nullptr || !in_range(byte_sums)) {
    return HYPER_ERROR_ARGUMENT;
  }
  if (!all_finite(tiles, n * hyper::kTileWeights)) return HYPER_ERROR_NON_FINITE;
  return guarded([&] { hyper::encode_tiles(tiles, n, bits, survivor_bits, byte_sums, clamped(threads), codes); });
}

int hyper_shift_encode(const float* tiles, int64_t n, int bits, int survivor_bits, uint32_t multiplier, int threads,
                       uint32_t* codes) {
  if (multiplier % 2 == 0) return HYPER_ERROR_ARGUMENT;
  int result = HYPER_OK;
  const int failure = guarded([&] {
    std::vector<uint16_t> byte_sums(hyper::kStates);
    hyper::fill_byte_sums(multiplier, byte_sums.data());
    result = hyper_shift_encode_observable(tiles, n, bits, survivor_bits, byte_sums.data(), threads, codes);
  });
  return failure == HYPER_OK ? result : failure;
}

int hyper_shift_decode(const uint32_t* codes, int64_t n, int bits, uint32_t multiplier, int threads, float* tiles) {
  if (n < 0 || bits < 1 || bits > 8 || multiplier % 2 == 0 || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (n == 0) return HYPER_OK;
  if (tiles == nullptr || codes == nullptr) return HYPER_ERROR_ARGUMENT;
  return guarded([&] { hyper::decode_tiles(codes, n, bits, multiplier, clamped(threads), tiles); });
}

int hyper_shift_matmul(const hyper_shift_plan* plan, const uint32_t* codes, const uint16_t* scale,
                       const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, int int8, int threads,
                       void* y) {
  if (!valid(plan) || !valid_dtype(dtype) || tokens < 0 || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (tokens == 0) return HYPER_OK;
  if (codes == nullptr || scale == nullptr || out_scale == nullptr || x == nullptr || y == nullptr) {
    return HYPER_ERROR_ARGUMENT;
  }
  return guarded([&] {
    hyper::multiply_shift(*plan, codes, scale, out_scale, x, dtype, tokens, int8 != 0, clamped(threads), y);
  });
}

int hyper_shift_matmul_dense(const hyper_shift_plan* plan, const uint32_t* codes, const uint16_t* scale,
                             const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, int int8,
                             int threads, void* y) {
  if (!valid(plan) || !valid_dtype(dtype) || tokens < 0 || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (tokens == 0) return HYPER_OK;
  if (codes == nullptr || scale == nullptr || out_scale == nullptr || x == nullptr || y == nullptr) {
    return HYPER_ERROR_ARGUMENT;
  }
  bool supported = false;
  const int failure = guarded([&] {
    const int used = clamped(threads);
    supported = hyper::multiply_shift_dense(*plan, codes, scale, out_scale, x, dtype, tokens, int8 != 0, used, y);
  });
  return failure != HYPER_OK ? failure : supported ? HYPER_OK : HYPER_ERROR_ISA;
}

int64_t hyper_dense_tokens(void) { return hyper::dense_tokens(); }

int hyper_shift_rotate(const hyper_shift_plan* plan, const void* x, int dtype, int64_t tokens, int threads,
                       void* rotated, int rotated_dtype, float* sums) {
  if (!valid(plan) || !valid_dtype(dtype) || !wide_dtype(rotated_dtype) || tokens < 0 || threads < 1) {
    return HYPER_ERROR_ARGUMENT;
  }
  if (tokens == 0) return HYPER_OK;
  if (x == nullptr || rotated == nullptr || sums == nullptr) return HYPER_ERROR_ARGUMENT;
  return guarded([&] { hyper::rotate_tokens(*plan, x, dtype, tokens, clamped(threads), rotated, rotated_dtype, sums); });
}

int hyper_shift_decode_rows(const hyper_shift_plan* plan, const uint32_t* codes, int64_t first_tile, int64_t tiles,
                            int threads, void* rows, int rows_dtype) {
  if (!valid(plan) || !wide_dtype(rows_dtype) || !valid_tiles(*plan, first_tile, tiles) || threads < 1) {
    return HYPER_ERROR_ARGUMENT;
  }
  if (tiles == 0) return HYPER_OK;
  if (codes == nullptr || rows == nullptr) return HYPER_ERROR_ARGUMENT;
  return guarded([&] { hyper::decode_rows(*plan, codes, first_tile, tiles, clamped(threads), rows, rows_dtype); });
}

int hyper_shift_finish(const hyper_shift_plan* plan, const void* product, int product_dtype, int64_t first_tile,
                       int64_t tiles, const float* sums, const uint16_t* scale, const uint16_t* out_scale,
                       int64_t tokens, int threads, void* y, int dtype) {
  if (!valid(plan) || !valid_dtype(dtype) || !wide_dtype(product_dtype) || tokens < 0 || threads < 1) {
    return HYPER_ERROR_ARGUMENT;
  }
  const int block = plan->output_block / 16;
  if (!valid_tiles(*plan, first_tile, tiles) || first_tile % block != 0 || tiles % block != 0) {
    return HYPER_ERROR_ARGUMENT;
  }
  if (tokens == 0 || tiles == 0) return HYPER_OK;
  if (product == nullptr || sums == nullptr || scale == nullptr || out_scale == nullptr || y == nullptr) {
    return HYPER_ERROR_ARGUMENT;
  }
  return guarded([&] {
    hyper::finish_tokens(*plan, product, product_dtype, first_tile, tiles, sums, scale, out_scale, tokens, clamped(threads), y,
                         dtype);
  });
}

int hyper_shift_decode_weight(const hyper_shift_plan* plan, const uint32_t* codes, const uint16_t* scale,
                              const uint16_t* out_scale, int threads, void* weight, int dtype) {
  if (!valid(plan) || !valid_dtype(dtype) || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (codes == nullptr || scale == nullptr || out_scale == nullptr || weight == nullptr) return HYPER_ERROR_ARGUMENT;
  return guarded(
      [&] { hyper::decode_weight(*plan, codes, scale, out_scale, clamped(threads), weight, dtype); });
}

int hyper_winding_nearest(const float* points, int64_t n, const float* nodes, int64_t num_nodes, int threads,
                          int32_t* index) {
  if (n < 0 || num_nodes < 1 || num_nodes > INT32_MAX || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (n == 0) return HYPER_OK;
  if (points == nullptr || nodes == nullptr || index == nullptr) return HYPER_ERROR_ARGUMENT;
  bool finite = true;
  const int failure =
      guarded([&] { finite = hyper::nearest_nodes(points, n, nodes, num_nodes, clamped(threads), index); });
  return failure != HYPER_OK ? failure : finite ? HYPER_OK : HYPER_ERROR_NON_FINITE;
}

int hyper_winding_matmul(const hyper_winding_plan* plan, const uint32_t* codes, const float* centre,
                         const float* shell_side, const void* x, int dtype, int64_t tokens, int threads, void* y) {
  if (!valid(plan) || !valid_dtype(dtype) || tokens < 0 || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (tokens == 0) return HYPER_OK;
  if (codes == nullptr || centre == nullptr || shell_side == nullptr || x == nullptr || y == nullptr) {
    return HYPER_ERROR_ARGUMENT;
  }
  return guarded(
      [&] { hyper::multiply_winding(*plan, codes, centre, shell_side, x, dtype, tokens, clamped(threads), y); });
}

int hyper_winding_matmul_dense(const hyper_winding_plan* plan, const uint32_t* codes, const float* centre,
                               const float* shell_side, const void* x, int dtype, int64_t tokens, int threads,
                               void* y) {
  if (!valid(plan) || !valid_dtype(dtype) || tokens < 0 || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (tokens == 0) return HYPER_OK;
  if (codes == nullptr || centre == nullptr || shell_side == nullptr || x == nullptr || y == nullptr) {
    return HYPER_ERROR_ARGUMENT;
  }
  bool supported = false;
  const int failure = guarded([&] {
    supported =
        hyper::multiply_winding_dense(*plan, codes, centre, shell_side, x, dtype, tokens, clamped(threads), y);
  });
  return failure != HYPER_OK ? failure : supported ? HYPER_OK : HYPER_ERROR_ISA;
}

int hyper_winding_decode(const hyper_winding_plan* plan, const uint32_t* codes, const float* centre,
                         const float* shell_side, int64_t first_row, int64_t rows, int threads, void* weights,
                         int dtype) {
  if (!valid(plan) || !valid_dtype(dtype) || threads < 1) return HYPER_ERROR_ARGUMENT;
  if (first_row < 0 || rows < 0 || rows > plan->out_features - first_row) return HYPER_ERROR_ARGUMENT;
  if (rows == 0) return HYPER_OK;
  if (codes == nullptr || centre == nullptr || shell_side == nullptr || weights == nullptr) return HYPER_ERROR_ARGUMENT;
  return guarded([&] {
    hyper::decode_winding(*plan, codes, centre, shell_side, first_row, rows, clamped(threads), weights, dtype);
  });
}
