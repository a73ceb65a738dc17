// Bodies of the `winding` kernels, on compiler vectors of 16 lanes, which every target lowers. Compiled once per
// instruction set, with internal linkage and without contraction of floating-point expressions.
#pragma once

#include <cstring>

#include "float16_inl.h"
#include "winding_steps.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define HYPER_INLINE inline __attribute__((always_inline))

namespace hyper {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

template <class Vector>
HYPER_INLINE void load(Vector& out, const void* from) {
  std::memcpy(&out, from, sizeof out);
}

// out[i] = table[index[i]], index in 0..15.
HYPER_INLINE void pick(Words& out, const void* table, const Ints& index) {
#if defined(__AVX512F__)
  __m512i at;
  std::memcpy(&at, &index, sizeof at);
  const __m512i found = _mm512_permutexvar_epi32(at, _mm512_loadu_si512(table));
  std::memcpy(&out, &found, sizeof out);
#elif defined(__AVX2__)
  const __m256i* from = static_cast<const __m256i*>(table);
  const __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
  for (int half = 0; half < 2; ++half) {
    __m256i at;
    std::memcpy(&at, reinterpret_cast<const char*>(&index) + 32 * half, sizeof at);
    const __m256i found = _mm256_blendv_epi8(_mm256_permutevar8x32_epi32(low, at), _mm256_permutevar8x32_epi32(high, at),
                                             _mm256_cmpgt_epi32(at, _mm256_set1_epi32(7)));
    std::memcpy(reinterpret_cast<char*>(&out) + 32 * half, &found, sizeof found);
  }
#else
  const char* from = static_cast<const char*>(table);
  for (int i = 0; i < kPairs; ++i) {
    uint32_t word;
    std::memcpy(&word, from + 4 * index[i], sizeof word);
    out[i] = word;
  }
#endif
}

// sum += a * b, rounded once where the machine can.
HYPER_INLINE void accumulate(Floats& sum, const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  __m512 s, x, y;
  std::memcpy(&s, &sum, sizeof s);
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  s = _mm512_fmadd_ps(x, y, s);
  std::memcpy(&sum, &s, sizeof s);
#elif defined(__FMA__)
  __m256 s[2], x[2], y[2];
  std::memcpy(s, &sum, sizeof s);
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int half = 0; half < 2; ++half) s[half] = _mm256_fmadd_ps(x[half], y[half], s[half]);
  std::memcpy(&sum, s, sizeof s);
#elif defined(__ARM_NEON)
  float32x4_t s[4], x[4], y[4];
  std::memcpy(s, &sum, sizeof s);
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int q = 0; q < 4; ++q) s[q] = vfmaq_f32(s[q], x[q], y[q]);
  std::memcpy(&sum, s, sizeof s);
#else
  sum += a * b;
#endif
}

// The codes of a group. A code ends at most 31 bits after the word it begins in, so two words hold it.
HYPER_INLINE void unpack(const WindingConstants& constants, const uint32_t* words, int phase, Ints& codes) {
  Ints index;
  Words bit, first, second;
  load(index, constants.word[phase]);
  load(bit, constants.bit[phase]);
  pick(first, words, index);
  pick(second, words, index + 1);
  const Words joined = first << bit | second >> 1 >> (31 - bit);
  codes = reinterpret_cast<Ints>(joined >> static_cast<uint32_t>(32 - constants.width));
}

// Both weights of 16 pairs.
HYPER_INLINE void decode_group(const WindingConstants& constants, const uint32_t* words, int phase, Floats weights[2]) {
  Ints codes;
  unpack(constants, words, phase, codes);
  // Quotient and remainder by the codes of a shell. Half a code is added so that rounding, which is less, cannot carry a
  // quotient past an integer: exact for codes below 2^22.
  Ints shell = __builtin_convertvector((__builtin_convertvector(codes, Floats) + 0.5f) * constants.inverse, Ints);
  const Ints node = codes - shell * constants.stride;
  const Ints beyond = (constants.shells - shell) >> 31;  // codes that are never written
  shell = (shell & ~beyond) | (beyond & constants.shells);

  Words side;
  if (constants.shells < kNearShells) {
    pick(side, constants.near_sides, shell);
  } else {
    for (int i = 0; i < kPairs; ++i) side[i] = bits_of(constants.sides[shell[i]]);
  }
  const Ints orbit = -node >> 31;  // all ones but at the centre
  const Words theta = reinterpret_cast<Words>(node) - 1u;
  for (int d = 0; d < 2; ++d) {
    const Ints angle = reinterpret_cast<Ints>(theta * constants.direction[d] - 0x80000000u) & orbit;
    const Floats coordinate = __builtin_convertvector(angle, Floats) * 0x1p-32f;
    weights[d] = reinterpret_cast<Floats>(side) * coordinate + constants.centre[d];
  }
}

// Calls body(group, words of the group, phase) for every group of a row; the last groups of a weight read from a copy,
// because nothing behind them may be read.
template <class Body>
HYPER_INLINE void for_groups(const WindingConstants& constants, const uint32_t* words, int64_t available,
                             int64_t groups, Body body) {
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t half_words = group * constants.width, first = half_words >> 1;
    const int phase = static_cast<int>(half_words & 1);
    if (first + kWindowWords <= available) {
      body(group, words + first, phase);
    } else {
      uint32_t copy[kWindowWords] = {};
      std::memcpy(copy, words + first, static_cast<size_t>(available - first) * sizeof copy[0]);
      body(group, copy, phase);
    }
  }
}

template <int kTokens>
void multiply_row(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                  const float* activations, float* sums) {
  Floats sum[kTokens] = {};
  for_groups(constants, words, available, groups, [&](int64_t group, const uint32_t* from, int phase) {
    Floats weights[2];
    decode_group(constants, from, phase, weights);
    const float* x = activations + group * kTokens * 2 * kPairs;
    for (int m = 0; m < kTokens; ++m) {
      for (int d = 0; d < 2; ++d) {
        Floats values;
        load(values, x + (2 * m + d) * kPairs);
        accumulate(sum[m], weights[d], values);
      }
    }
  });
  for (int m = 0; m < kTokens; ++m) {
    float part[kPairs];
    std::memcpy(part, &sum[m], sizeof part);
    for (int half = kPairs / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    sums[m] = part[0];
  }
}

inline void decode_row(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                       float* weights) {
  for_groups(constants, words, available, groups, [&](int64_t group, const uint32_t* from, int phase) {
    float pairs[2][kPairs];
    Floats decoded[2];
    decode_group(constants, from, phase, decoded);
    std::memcpy(pairs, decoded, sizeof pairs);
    float* to = weights + group * 2 * kPairs;
    for (int i = 0; i < kPairs; ++i) {
      to[2 * i] = pairs[0][i];
      to[2 * i + 1] = pairs[1][i];
    }
  });
}

inline void arrange(const void* x, int dtype, int64_t columns, int token, int tokens, float* activations) {
  constexpr int kColumns = 2 * kPairs;
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t count = columns - first < kColumns ? columns - first : kColumns;
    float values[kColumns] = {};
    load_as_float(x, dtype, first, count, values);
    float* to = activations + (first / kColumns * tokens + token) * kColumns;
    for (int i = 0; i < kPairs; ++i) {
      to[i] = values[2 * i];
      to[kPairs + i] = values[2 * i + 1];
    }
  }
}

constexpr WindingSteps winding_table() {
  return {{multiply_row<1>, multiply_row<2>, multiply_row<4>, multiply_row<8>}, decode_row, arrange, store_as};
}

}  // namespace
}  // namespace hyper
