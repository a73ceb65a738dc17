// Rotations around a product and of a weight: signs, Walsh-Hadamard transforms and cosine transforms, in float.
//
// The definition is storage/FORMAT.md, "Incoherence"; the torch version is rotation/incoherence.py. Compiled once per
// instruction set, with internal linkage.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "hadamard_inl.h"
#include "shift_matmul_steps.h"

namespace hyper {
namespace {

// Rows first, first + 2, ... of a cosine matrix times a column of `half` values, kRows of them -> to, `inner` apart.
template <int kRows, class Lanes>
HYPER_INLINE void mix_rows(const Lanes* column, int64_t half, const float* matrix, int64_t size, int64_t first,
                           int64_t inner, float* to) {
  Lanes sum[kRows] = {};
  const float* row = matrix + first * size;
  for (int64_t j = 0; j < half; ++j) {
    HYPER_UNROLL
    for (int q = 0; q < kRows; ++q) sum[q] += column[j] * row[2 * q * size + j];
  }
  HYPER_UNROLL
  for (int q = 0; q < kRows; ++q) std::memcpy(to + (first + 2 * q) * inner, &sum[q], sizeof(Lanes));
}

// x viewed as [count / (size * inner), size, inner]: the middle axis times the cosine matrix [size, size] transposed. Its
// even rows are even about their middle and its odd rows odd, which halves the products.
template <int kLanes, int kMaxSize>
inline void mix_columns(float* x, int64_t count, int64_t size, int64_t inner, const float* matrix) {
  typedef float Lanes __attribute__((vector_size(4 * kLanes)));
  constexpr int kRows = 4;  // independent sums, to hide the latency of fma
  const int64_t half = (size + 1) / 2;
  Lanes column[2][kMaxSize / 2 + 1];
  for (int64_t start = 0; start < count; start += size * inner) {
    for (int64_t i = 0; i < inner; i += kLanes) {
      float* from = x + start + i;
      for (int64_t j = 0; j < size / 2; ++j) {
        Lanes low, high;
        std::memcpy(&low, from + j * inner, sizeof low);
        std::memcpy(&high, from + (size - 1 - j) * inner, sizeof high);
        column[0][j] = low + high;
        column[1][j] = low - high;
      }
      if (size % 2 == 1) std::memcpy(&column[0][half - 1], from + (half - 1) * inner, sizeof(Lanes));
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t terms = odd == 1 ? size / 2 : half;
        int64_t r = odd;
        for (; r + 2 * (kRows - 1) < size; r += 2 * kRows) {
          mix_rows<kRows>(column[odd], terms, matrix, size, r, inner, from);
        }
        for (; r < size; r += 2) mix_rows<1>(column[odd], terms, matrix, size, r, inner, from);
      }
    }
  }
}

// The stack of a host's thread may be small, so the rare large sizes, all of them primes, take narrower columns.
inline void mix_axis(float* x, int64_t count, int64_t size, int64_t inner, const float* matrix) {
  if (size <= 64) {
    mix_columns<16, 64>(x, count, size, inner, matrix);
  } else {
    mix_columns<4, 1024>(x, count, size, inner, matrix);
  }
}

// The same for an odd size whose columns fit in 32 registers, or nearly; values go to store(i, lanes), which may write to x.
template <int kSize, class Store>
inline void mix_registers(const float* x, int64_t count, int64_t inner, const float* matrix, Store store) {
  constexpr int kHalf = kSize / 2, kWide = Store::kWide;
  for (int64_t start = 0; start < count; start += kSize * inner) {
    for (int64_t i = start; i < start + inner; i += 16 * kWide) {
      Float16Lanes column[2][kHalf + 1][kWide];
      HYPER_UNROLL
      for (int w = 0; w < kWide; ++w) {
        const float* at = x + i + 16 * w;
        HYPER_UNROLL
        for (int j = 0; j < kHalf; ++j) {
          Float16Lanes low, high;
          load16(low, at + j * inner);
          load16(high, at + (kSize - 1 - j) * inner);
          column[0][j][w] = low + high;
          column[1][j][w] = low - high;
        }
        load16(column[0][kHalf][w], at + kHalf * inner);
      }
      HYPER_UNROLL
      for (int r = 0; r < kSize; ++r) {
        Float16Lanes sum[kWide];
        HYPER_UNROLL
        for (int w = 0; w < kWide; ++w) sum[w] = column[r % 2][0][w] * matrix[r * kSize];
        HYPER_UNROLL
        for (int j = 1; j <= kHalf; ++j) {
          HYPER_UNROLL
          for (int w = 0; w < kWide; ++w) {
            if (j + r % 2 <= kHalf) sum[w] += column[r % 2][j][w] * matrix[r * kSize + j];
          }
        }
        store(i + r * inner, sum);
      }
    }
  }
}

// The last factor of a rotation.
template <class Store>
inline void mix_last(float* x, int64_t count, int64_t size, int64_t inner, const float* matrix, Store store) {
  if (size == 3) return mix_registers<3>(x, count, inner, matrix, store);
  if (size == 5) return mix_registers<5>(x, count, inner, matrix, store);
  if (size == 7) return mix_registers<7>(x, count, inner, matrix, store);
  if (size == 9) return mix_registers<9>(x, count, inner, matrix, store);
  if (size == 15) return mix_registers<15>(x, count, inner, matrix, store);
  mix_axis(x, count, size, inner, matrix);
  hand_over(x, count, store);
}

// kColumns columns first, first + 1, ... of the transposed matrix times the values of `mixed`, and their mirror images.
template <int kColumns, class Lanes>
HYPER_INLINE void unmix_rows(const Lanes* mixed, int64_t size, const float* matrix, int64_t first, int64_t inner,
                             float* to) {
  Lanes even[kColumns] = {}, odd[kColumns] = {};
  const float* row = matrix + first;
  for (int64_t r = 0; r + 1 < size; r += 2, row += 2 * size) {
    HYPER_UNROLL
    for (int q = 0; q < kColumns; ++q) {
      even[q] += mixed[r] * row[q];
      odd[q] += mixed[r + 1] * row[size + q];
    }
  }
  HYPER_UNROLL
  for (int q = 0; q < kColumns; ++q) {
    if (size % 2 == 1) even[q] += mixed[size - 1] * row[q];
    const Lanes low = even[q] + odd[q], high = even[q] - odd[q];
    std::memcpy(to + (size - 1 - first - q) * inner, &high, sizeof high);
    std::memcpy(to + (first + q) * inner, &low, sizeof low);  // the middle is its own image
  }
}

// The transpose of mix_columns.
template <int kLanes, int kMaxSize>
inline void unmix_columns(float* x, int64_t count, int64_t size, int64_t inner, const float* matrix) {
  typedef float Lanes __attribute__((vector_size(4 * kLanes)));
  constexpr int kColumns = 2;
  const int64_t half = (size + 1) / 2;
  Lanes mixed[kMaxSize];
  for (int64_t start = 0; start < count; start += size * inner) {
    for (int64_t i = 0; i < inner; i += kLanes) {
      float* from = x + start + i;
      for (int64_t r = 0; r < size; ++r) std::memcpy(&mixed[r], from + r * inner, sizeof(Lanes));
      int64_t j = 0;
      for (; j + kColumns <= half; j += kColumns) unmix_rows<kColumns>(mixed, size, matrix, j, inner, from);
      for (; j < half; ++j) unmix_rows<1>(mixed, size, matrix, j, inner, from);
    }
  }
}

inline void unmix_axis(float* x, int64_t count, int64_t size, int64_t inner, const float* matrix) {
  if (size <= 64) {
    unmix_columns<16, 64>(x, count, size, inner, matrix);
  } else {
    unmix_columns<4, 1024>(x, count, size, inner, matrix);
  }
}

inline int64_t padded_to_tiles(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

// x [count] times scales -> the first stages of the transform, for runs of `run`; x may be `out`.
template <class Value>
inline void scaled_hadamard(const Value* x, const float* scales, int64_t count, int64_t run, float* out) {
  short_hadamard(
      count, run,
      [=](int64_t i, Float16Lanes* lanes) HYPER_INLINE_LAMBDA {
        Float16Lanes factors;
        load16(factors, scales + i);
        load16(*lanes, x + i);
        *lanes *= factors;
      },
      [=](int64_t i, const Float16Lanes& lanes) HYPER_INLINE_LAMBDA { store16(out + i, lanes); });
}

// Input side of a rotation: its width, the power of two in the width of a part, and what registers transform at once.
struct InputSide {
  explicit InputSide(const hyper_shift_plan& plan)
      : padded(padded_to_tiles(plan.in_features)), width(padded / plan.input_blocks), power(width & -width),
        run(power < 128 ? power : 128) {}
  const int64_t padded, width, power, run;
};

// What is left of a rotation after the transforms of runs, which lie in `values` -> store(i, lanes).
template <class Store>
inline void rotate_from_runs(const hyper_shift_plan& plan, const InputSide& side, float* values, Store store) {
  if (plan.num_factors == 0) {
    if (side.run == side.power) return hand_over(values, side.padded, store);
    return widen_hadamard(values, side.padded, side.run, side.power, store);
  }
  widen_hadamard(values, side.padded, side.run, side.power);
  int64_t inner = side.width;
  const float* matrix = plan.cosines;
  for (int f = 0;; ++f) {
    const int64_t size = plan.factors[f];
    inner /= size;
    if (f + 1 == plan.num_factors) return mix_last(values, side.padded, size, inner, matrix, store);
    mix_axis(values, side.padded, size, inner, matrix);
    matrix += size * size;
  }
}

// R_in S_in x -> store(i, lanes); `values` [padded_in] hold what is between.
template <class Store>
inline void rotate(const hyper_shift_plan& plan, const void* x, int dtype, float* values, Store store) {
  const InputSide side(plan);
  if (dtype == HYPER_BFLOAT16 && side.padded == plan.in_features) {
    scaled_hadamard(static_cast<const uint16_t*>(x), plan.scales_in, side.padded, side.run, values);
  } else {
    load_as_float(x, dtype, 0, plan.in_features, values);
    for (int64_t i = plan.in_features; i < side.padded; ++i) values[i] = 0.0f;
    scaled_hadamard(static_cast<const float*>(values), plan.scales_in, side.padded, side.run, values);
  }
  rotate_from_runs(plan, side, values, store);
}

inline void rotate(const hyper_shift_plan& plan, const void* x, int dtype, float* rotated) {
  rotate(plan, x, dtype, rotated, InPlace{rotated});
}

// Of the values of R_in S_in x.
inline float rotated_sum(const hyper_shift_plan& plan, const void* x, int dtype) {
  const InputSide side(plan);
  double sum = 0;
  for (int64_t i = 0; i * side.power < plan.in_features; ++i) {
    float value;
    if (dtype == HYPER_BFLOAT16) {
      value = from_bfloat16(static_cast<const uint16_t*>(x)[i * side.power]);
    } else {
      load_as_float(x, dtype, i * side.power, 1, &value);
    }
    sum += static_cast<double>(plan.sum_weights[i]) * value;
  }
  return static_cast<float>(sum);
}

inline float rotate_input(const hyper_shift_plan& plan, const void* x, int dtype, float* rotated) {
  rotate(plan, x, dtype, rotated);
  return rotated_sum(plan, x, dtype);
}

// What transformed rows first, first + 1, ... of the output side are multiplied with; 0 beyond the last.
inline void output_factors(const hyper_shift_plan& plan, int64_t first, int64_t count, const uint16_t* out_scale,
                           float* factors) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(plan.output_block));
  for (int64_t r = 0; r < count; ++r) {
    const bool there = first + r < plan.out_features;
    factors[r] = there ? scale * plan.signs_out[first + r] * from_bfloat16(out_scale[first + r]) : 0.0f;
  }
}

// S_out R_out^T of `count` rows from `first` on, whole blocks, of which load(i, lanes) gives some -> out[first...]
template <class Load>
HYPER_INLINE void rotate_rows(const hyper_shift_plan& plan, int64_t first, int64_t count, const float* factors,
                              int dtype, void* out, int64_t token, Load load) {
  const int64_t rows = plan.out_features - first, to = token * plan.out_features + first;
  const auto store = [=](int64_t i, Float16Lanes& lanes) HYPER_INLINE_LAMBDA {
    Float16Lanes factor;
    load16(factor, factors + i);
    lanes *= factor;
    store_lanes(lanes, rows - i, dtype, out, to + i);
  };
  short_hadamard<1, std::min(kVectorsAtOnce, kMaxOutputBlock / kTile)>(count, plan.output_block, load, store);
}

inline void rotate_output(const hyper_shift_plan& plan, int64_t block, const uint16_t* out_scale, const float* y,
                          int64_t tokens, int64_t stride, int dtype, void* out) {
  const int64_t width = plan.output_block, first = block * width;
  float factors[kMaxOutputBlock];
  output_factors(plan, first, width, out_scale, factors);
  for (int64_t m = 0; m < tokens; ++m, y += stride) {
    rotate_rows(plan, first, width, factors, dtype, out, m,
                [=](int64_t i, Float16Lanes* lanes) HYPER_INLINE_LAMBDA { load16(*lanes, y + i); });
  }
}

inline void rotate_columns(const hyper_shift_plan& plan, int64_t first, const float* units, float* sums,
                           int64_t columns, float* to, int64_t stride) {
  const int64_t rows = plan.output_block;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = r * columns; i < (r + 1) * columns; i += 16) {
      Float16Lanes lanes;
      load16(lanes, sums + i);
      store16(sums + i, (lanes - plan.mean_offset) * units[r]);
    }
  }
  widen_hadamard(sums, rows * columns, columns, rows * columns);
  const float scale = 1.0f / std::sqrt(static_cast<float>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = scale * plan.signs_out[first + r];
    for (int64_t i = 0; i < columns; i += 16) {
      Float16Lanes lanes;
      load16(lanes, sums + r * columns + i);
      store16(to + r * stride + i, lanes * factor);
    }
  }
}

inline void unrotate_input(const hyper_shift_plan& plan, float* rotated, float scale, int dtype, void* to,
                           int64_t first) {
  constexpr float kLargest = 3.40282347e38f;
  const InputSide side(plan);
  int64_t inner = side.width;
  const float* matrix = plan.cosines;
  for (int f = 0; f < plan.num_factors; ++f) {
    inner /= plan.factors[f];
    matrix += int64_t{plan.factors[f]} * plan.factors[f];
  }
  for (int f = plan.num_factors - 1; f >= 0; --f) {
    const int64_t size = plan.factors[f];
    matrix -= size * size;
    unmix_axis(rotated, side.padded, size, inner, matrix);
    inner *= size;
  }
  widen_hadamard(rotated, side.padded, side.run, side.power);
  short_hadamard(
      side.padded, side.run, [=](int64_t i, Float16Lanes* lanes) HYPER_INLINE_LAMBDA { load16(*lanes, rotated + i); },
      [=, &plan](int64_t i, const Float16Lanes& unscaled) HYPER_INLINE_LAMBDA {
        Float16Lanes factors;
        load16(factors, plan.scales_in + i);
        Float16Lanes lanes = unscaled * factors * scale;
        lanes = lanes > kLargest ? Float16Lanes{} + kLargest : lanes;
        lanes = lanes < -kLargest ? Float16Lanes{} - kLargest : lanes;
        store_lanes(lanes, plan.in_features - i, dtype, to, first + i);
      });
}

inline void scale_product(const void* product, int dtype, int64_t rows, const float* units, float offset,
                          float* values) {
  load_scaled(product, dtype, rows, units, values);
  for (int64_t r = 0; r < rows; ++r) values[r] -= offset * units[r];
}

inline void to_bfloat16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
}

}  // namespace
}  // namespace hyper
