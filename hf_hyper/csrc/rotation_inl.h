// Rotations around a product and of a weight: signs, Walsh-Hadamard transforms and cosine transforms, in float.
//
// The definition is storage/FORMAT.md, "Incoherence"; the torch version is rotation/incoherence.py. Compiled once per
// instruction set, with internal linkage; vectors are compiler vectors of 16 floats, which every target lowers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "float16_inl.h"
#include "shift_matmul_steps.h"
#include "simd/unroll.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hyper {
namespace {

typedef float Float16Lanes __attribute__((vector_size(64)));
typedef int32_t Index16Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits16Lanes __attribute__((vector_size(64)));
typedef uint16_t Half16Lanes __attribute__((vector_size(32)));

HYPER_INLINE void load16(Float16Lanes& out, const float* p) { std::memcpy(&out, p, 64); }
HYPER_INLINE void store16(float* p, const Float16Lanes& a) { std::memcpy(p, &a, 64); }

// x = x[i ^ kHalf] + (x or -x): one stage of the transform inside a vector.
template <int kHalf>
HYPER_INLINE void butterfly(Float16Lanes& x) {
  constexpr auto sign = [](int i) { return i & kHalf ? -1.0f : 1.0f; };
  const Float16Lanes signs = {sign(0), sign(1), sign(2),  sign(3),  sign(4),  sign(5),  sign(6),  sign(7),
                              sign(8), sign(9), sign(10), sign(11), sign(12), sign(13), sign(14), sign(15)};
#if defined(__clang__)
  const Float16Lanes other = __builtin_shufflevector(
      x, x, 0 ^ kHalf, 1 ^ kHalf, 2 ^ kHalf, 3 ^ kHalf, 4 ^ kHalf, 5 ^ kHalf, 6 ^ kHalf, 7 ^ kHalf, 8 ^ kHalf,
      9 ^ kHalf, 10 ^ kHalf, 11 ^ kHalf, 12 ^ kHalf, 13 ^ kHalf, 14 ^ kHalf, 15 ^ kHalf);
#else
  const Index16Lanes index = {0 ^ kHalf,  1 ^ kHalf,  2 ^ kHalf,  3 ^ kHalf, 4 ^ kHalf,  5 ^ kHalf,
                              6 ^ kHalf,  7 ^ kHalf,  8 ^ kHalf,  9 ^ kHalf, 10 ^ kHalf, 11 ^ kHalf,
                              12 ^ kHalf, 13 ^ kHalf, 14 ^ kHalf, 15 ^ kHalf};
  const Float16Lanes other = __builtin_shuffle(x, index);
#endif
  x = other + x * signs;
}

HYPER_INLINE void load16(Float16Lanes& out, const uint16_t* bfloat16) {
#if defined(__AVX512F__)  // compilers take five instructions for it
  const __m512i bits = _mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16))), 16);
#else
  Half16Lanes half;
  std::memcpy(&half, bfloat16, sizeof half);
  const Bits16Lanes bits = __builtin_convertvector(half, Bits16Lanes) << 16;
#endif
  std::memcpy(&out, &bits, sizeof out);
}

HYPER_OUTLINE inline void store_values(const float* values, int64_t count, int dtype, void* to, int64_t first) {
  if (count > 0) store_as(values, count < 16 ? count : 16, dtype, to, first);
}

// The first `count` lanes -> to[first...] of a HYPER_* dtype.
HYPER_INLINE void store_lanes(const Float16Lanes& lanes, int64_t count, int dtype, void* to, int64_t first) {
  if (dtype == HYPER_BFLOAT16 && count >= 16) {
#if defined(__AVX512BF16__)
    __m512 values;
    std::memcpy(&values, &lanes, sizeof values);
    const __m256bh rounded = _mm512_cvtneps_pbh(values);
#else
    Bits16Lanes bits;
    std::memcpy(&bits, &lanes, sizeof bits);
    const Bits16Lanes even = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    const Half16Lanes rounded = __builtin_convertvector(lanes == lanes ? even : Bits16Lanes{} + 0x7fc0u, Half16Lanes);
#endif
    std::memcpy(static_cast<uint16_t*>(to) + first, &rounded, sizeof rounded);
    return;
  }
  if (dtype == HYPER_FLOAT32 && count >= 16) return store16(static_cast<float*>(to) + first, lanes);
  float values[16];
  store16(values, lanes);
  store_values(values, count, dtype, to, first);
}

#if defined(__AVX512F__)
constexpr int kVectorsAtOnce = 16;  // half of the registers: enough work that none of it waits for the stage before
#else
constexpr int kVectorsAtOnce = 1;
#endif

// Walsh-Hadamard transforms of kRuns consecutive runs of 16 * kVectors values, not scaled, in registers: load(i, lanes)
// gives values i..i + 16 * kWide - 1 in kWide vectors, store(i, lanes) takes 16. Where kWide is 2 the vectors are to hold
// sums and differences of neighbours, and are stored one after the other.
template <int kVectors, int kRuns, int kWide, class Load, class Store>
HYPER_INLINE void hadamard_in_registers(int64_t start, Load load, Store store) {
  constexpr int kAll = kVectors * kRuns;
  Float16Lanes a[kAll];
  HYPER_UNROLL
  for (int v = 0; v < kAll; v += kWide) load(start + 16 * v, a + v);
  HYPER_UNROLL
  for (int v = 0; v < kAll; ++v) butterfly<1>(a[v]);
  HYPER_UNROLL
  for (int v = 0; v < kAll; ++v) butterfly<2>(a[v]);
  HYPER_UNROLL
  for (int v = 0; v < kAll; ++v) butterfly<4>(a[v]);
  HYPER_UNROLL
  for (int v = 0; v < kAll; ++v) butterfly<8>(a[v]);
  HYPER_UNROLL
  for (int half = kWide; half < kVectors; half *= 2) {
    HYPER_UNROLL
    for (int v = 0; v < kAll; ++v) {
      if (v & half) continue;
      const Float16Lanes sum = a[v] + a[v + half];
      a[v + half] = a[v] - a[v + half];
      a[v] = sum;
    }
  }
  HYPER_UNROLL
  for (int v = 0; v < kAll; ++v) store(start + 16 * v, a[v]);
}

// Consecutive runs of `count` values in all, up to kAtOnce vectors at a time.
template <int kVectors, int kWide, int kAtOnce, class Load, class Store>
HYPER_INLINE void hadamard_runs(int64_t count, Load load, Store store) {
  constexpr int kFit = kVectors < kAtOnce ? kAtOnce / kVectors : 1;
  constexpr int kRun = 16 * kVectors, kRuns = kRun == 64 && kFit == 4 ? 3 : kFit;  // 3 leave none of 192 and 576 over
  int64_t start = 0;
  for (; start + kRuns * kRun <= count; start += kRuns * kRun) {
    hadamard_in_registers<kVectors, kRuns, kWide>(start, load, store);
  }
  for (; start < count; start += kRun) hadamard_in_registers<kVectors, 1, kWide>(start, load, store);
}

// The same for runs of `width`: 16 * kWide to 128; store(i, lanes) may change its lanes.
template <int kWide = 1, int kAtOnce = kVectorsAtOnce, class Load, class Store>
inline void short_hadamard(int64_t count, int64_t width, Load load, Store store) {
  if constexpr (kWide == 1) {
    if (width == 16) hadamard_runs<1, kWide, kAtOnce>(count, load, store);
  }
  if (width == 32) hadamard_runs<2, kWide, kAtOnce>(count, load, store);
  if (width == 64) hadamard_runs<4, kWide, kAtOnce>(count, load, store);
  if (width == 128) hadamard_runs<8, kWide, kAtOnce>(count, load, store);
}

// What takes the results of a rotation, kWide vectors at a time: of x where they are.
struct InPlace {
  static constexpr int kWide = 1;
  float* x;
  HYPER_INLINE void operator()(int64_t i, const Float16Lanes* lanes) const { store16(x + i, *lanes); }
};

// Values that lie in x -> store(i, lanes).
template <class Store>
inline void hand_over(const float* x, int64_t count, Store store) {
  if constexpr (!std::is_same_v<Store, InPlace>) {
    for (int64_t i = 0; i < count; i += 16 * Store::kWide) {
      Float16Lanes lanes[Store::kWide];
      for (int w = 0; w < Store::kWide; ++w) load16(lanes[w], x + i + 16 * w);
      store(i, lanes);
    }
  }
}

// From transforms of consecutive runs of `half` to those of runs of `width` > half, both powers of two and at least 16 *
// Store::kWide. The last pass over memory hands values to store(i, lanes), those before it write to x.
template <class Store>
inline void widen_hadamard(float* x, int64_t count, int64_t half, int64_t width, Store store) {
  const auto widen_twice = [=](int64_t from, auto to) HYPER_INLINE_LAMBDA {
    constexpr int kWide = decltype(to)::kWide;
    for (int64_t start = 0; start < count; start += 4 * from) {
      for (int64_t i = start; i < start + from; i += 16 * kWide) {
        Float16Lanes wider[4][kWide];
        HYPER_UNROLL
        for (int w = 0; w < kWide; ++w) {
          const float* at = x + i + 16 * w;
          Float16Lanes a, b, c, d;
          load16(a, at);
          load16(b, at + from);
          load16(c, at + 2 * from);
          load16(d, at + 3 * from);
          const Float16Lanes ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
          wider[0][w] = ab + cd;
          wider[1][w] = a_b + c_d;
          wider[2][w] = ab - cd;
          wider[3][w] = a_b - c_d;
        }
        HYPER_UNROLL
        for (int q = 0; q < 4; ++q) to(i + q * from, wider[q]);
      }
    }
  };
  for (; 4 * half < width; half *= 4) widen_twice(half, InPlace{x});
  if (4 * half == width) return widen_twice(half, store);
  constexpr int kWide = Store::kWide;
  for (int64_t start = 0; start < count; start += 2 * half) {
    for (int64_t i = start; i < start + half; i += 16 * kWide) {
      Float16Lanes sum[kWide], difference[kWide];
      HYPER_UNROLL
      for (int w = 0; w < kWide; ++w) {
        Float16Lanes a, b;
        load16(a, x + i + 16 * w);
        load16(b, x + i + 16 * w + half);
        sum[w] = a + b;
        difference[w] = a - b;
      }
      store(i, sum);
      store(i + half, difference);
    }
  }
}

inline void widen_hadamard(float* x, int64_t count, int64_t half, int64_t width) {
  if (half < width) widen_hadamard(x, count, half, width, InPlace{x});
}

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
