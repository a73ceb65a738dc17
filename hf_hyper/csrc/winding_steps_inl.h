// Bodies of the `winding` kernels, on compiler vectors of 16 lanes, which every target lowers. Compiled once per
// instruction set, with internal linkage and without contraction of floating-point expressions.
#pragma once

#include <cstring>

#include "float16_inl.h"
#include "simd/unroll.h"
#include "winding_steps.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace hyper {
namespace {

constexpr int kPrefetchWords = 1024;  // ahead of a group

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

// The codes of a group, each with the bits that precede it in the string above it.
HYPER_INLINE void unpack(const WindingConstants& constants, const uint32_t* words, int phase, Words& codes) {
#if defined(__AVX512VBMI__)
  // Four bytes hold a code wherever it begins.
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(constants.bytes[phase]), _mm512_loadu_si512(words));
  const __m512i found = _mm512_srlv_epi32(bytes, _mm512_loadu_si512(constants.shift[phase]));
  std::memcpy(&codes, &found, sizeof codes);
#else
  Ints index;
  Words bit, first, second;
  load(index, constants.word[phase]);
  load(bit, constants.bit[phase]);
  pick(first, words, index);
  pick(second, words, index + 1);
  codes = (first << bit | second >> 1 >> (31 - bit)) >> static_cast<uint32_t>(32 - constants.width);
#endif
}

// Where 16 points lie: the sides of their shells, node - 1, which is all ones at the centre, and theta of both coordinates
// in units of 2^-32, of no meaning there.
struct Points {
  Floats side;
  Words place;
  Words angle[2];
};

// Of codes with any bits above them. kNear: no code is so large that its quotient lies beyond the tables.
template <bool kNear>
HYPER_INLINE void locate(const WindingConstants& constants, const Words& found, Points& points) {
  const Words codes = (found & constants.mask) | kFloatOne;
  // Quotient by the codes of a shell. Half a code is added so that rounding, which is less, cannot carry a quotient past
  // an integer: exact for codes below 2^22.
  Ints shell = __builtin_convertvector((reinterpret_cast<Floats>(codes) - (0x1p23f - 0.5f)) * constants.inverse, Ints);
  Words side, start;
  if constexpr (kNear) {
    pick(side, constants.near_sides, shell);
    pick(start, constants.near_starts, shell);
  } else {
    start = reinterpret_cast<Words>(shell * constants.stride) + (kFloatOne + 1);
    const Ints beyond = (constants.shells - shell) >> 31;  // codes that are never written
    shell = (shell & ~beyond) | (beyond & constants.shells);
    for (int i = 0; i < kPairs; ++i) side[i] = bits_of(constants.sides[shell[i]]);
  }
  points.side = reinterpret_cast<Floats>(side);
  points.place = codes - start;
  for (int d = 0; d < 2; ++d) points.angle[d] = points.place * constants.direction[d];
}

// Both weights of every point.
HYPER_INLINE void weigh(const WindingConstants& constants, const Points& points, Floats weight[2]) {
  const Floats side = points.place != ~0u ? points.side : Floats{};
  for (int d = 0; d < 2; ++d) {
    const Ints angle = reinterpret_cast<Ints>(points.angle[d] - 0x80000000u);
    weight[d] = side * (__builtin_convertvector(angle, Floats) * 0x1p-32f) + constants.centre[d];
  }
}

// Calls body(group, words of the group, phase) for every group of a row; the last groups of a weight read from a copy,
// because nothing behind them may be read.
template <class Body>
HYPER_INLINE void for_groups(const WindingConstants& constants, const uint32_t* words, int64_t available,
                             int64_t groups, Body body) {
  const int width = constants.width;
  int64_t group = 0;
  // Two groups are `width` words.
  for (; group + 2 <= groups && group / 2 * width + width / 2 + kWindowWords <= available; group += 2) {
    const uint32_t* from = words + group / 2 * width;
    __builtin_prefetch(from + kPrefetchWords);
    body(group, from, 0);
    body(group + 1, from + width / 2, width % 2);
  }
  for (; group < groups; ++group) {
    const int64_t half_words = group * width, left = available - half_words / 2;
    uint32_t copy[kWindowWords] = {};
    std::memcpy(copy, words + half_words / 2, static_cast<size_t>(left < kWindowWords ? left : kWindowWords) * 4);
    body(group, copy, static_cast<int>(half_words % 2));
  }
}

template <int kTokens, bool kNear>
void multiply_row(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                  const float* activations, float* sums) {
  constexpr int kStreams = activation_streams(kTokens);
  Floats sum[kTokens] = {};
  for_groups(constants, words, available, groups, [&](int64_t group, const uint32_t* from, int phase) {
    Words codes;
    unpack(constants, from, phase, codes);
    Points points;
    locate<kNear>(constants, codes, points);
    const Floats side = points.place != ~0u ? points.side : Floats{};
    Floats factor[2];  // theta, or the weight less its centre
    for (int d = 0; d < 2; ++d) {
      factor[d] = __builtin_convertvector(points.angle[d], Floats);
      if constexpr (kStreams == 2) {
        const Floats theta = factor[d];
        factor[d] = side * -0x1p31f;
        accumulate(factor[d], theta, side);
      }
    }
    const float* x = activations + group * kTokens * kStreams * kPairs;
    for (int m = 0; m < kTokens; ++m, x += kStreams * kPairs) {
      Floats first, second;
      load(first, x);
      load(second, x + kPairs);
      if constexpr (kStreams == 3) {
        Floats inner;
        load(inner, x + 2 * kPairs);
        accumulate(inner, factor[0], first);
        accumulate(inner, factor[1], second);
        accumulate(sum[m], side, inner);
      } else {
        accumulate(sum[m], factor[0], first);
        accumulate(sum[m], factor[1], second);
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

template <bool kNear>
void decode_row(const WindingConstants& constants, const uint32_t* words, int64_t available, int64_t groups,
                float* weights) {
  for_groups(constants, words, available, groups, [&](int64_t group, const uint32_t* from, int phase) {
    Words codes;
    unpack(constants, from, phase, codes);
    Points points;
    locate<kNear>(constants, codes, points);
    float pairs[2][kPairs];
    Floats weight[2];
    weigh(constants, points, weight);
    std::memcpy(pairs, weight, sizeof pairs);
    float* to = weights + group * 2 * kPairs;
    for (int i = 0; i < kPairs; ++i) {
      to[2 * i] = pairs[0][i];
      to[2 * i + 1] = pairs[1][i];
    }
  });
}

inline void arrange(const void* x, int dtype, int64_t columns, int token, int tokens, float* activations, float* sums) {
  constexpr int kColumns = 2 * kPairs;
  const int streams = activation_streams(tokens);
  double total[kColumns] = {};
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t count = columns - first < kColumns ? columns - first : kColumns;
    float values[kColumns] = {};
    load_as_float(x, dtype, first, count, values);
    float* to = activations + (first / kColumns * tokens + token) * streams * kPairs;
    for (int i = 0; i < kPairs; ++i) {
      to[i] = values[2 * i] * 0x1p-32f;
      to[kPairs + i] = values[2 * i + 1] * 0x1p-32f;
      if (streams == 3) to[2 * kPairs + i] = -0.5f * (values[2 * i] + values[2 * i + 1]);
    }
    for (int i = 0; i < kColumns; ++i) total[i] += values[i];
  }
  for (int d = 0; d < 2; ++d) {
    double sum = 0;
    for (int i = 0; i < kPairs; ++i) sum += total[2 * i + d];
    sums[d] = static_cast<float>(sum);
  }
}

template <bool kNear>
constexpr WindingRow winding_row() {
  return {{multiply_row<1, kNear>, multiply_row<2, kNear>, multiply_row<4, kNear>, multiply_row<8, kNear>},
          decode_row<kNear>};
}

constexpr WindingSteps winding_table() { return {{winding_row<false>(), winding_row<true>()}, arrange, store_as}; }

}  // namespace
}  // namespace hyper
