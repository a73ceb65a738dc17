// Walsh-Hadamard transforms of float, not scaled: in registers, and over memory from there on. Compiled once per instruction
// set, with internal linkage; vectors are compiler vectors of 16 floats, which every target lowers.
#pragma once

#include <cstring>
#include <type_traits>

#include "float16_inl.h"
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

}  // namespace
}  // namespace hyper
