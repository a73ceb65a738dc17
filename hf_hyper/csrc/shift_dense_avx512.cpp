// Products for many tokens: AVX-512 with BF16.
#include <cstring>
#include <utility>

#include "shift_dense_steps.h"
#include "simd/words_avx512.h"

#include "rotation_inl.h"
#include "shift_matmul_inl.h"

namespace hyper {
namespace {

using W = WordsAvx512;

// Lanes of `even`, then those of `odd`.
HYPER_INLINE __m512i joined(W::Float even, W::Float odd) { return (__m512i)_mm512_cvtne2ps_pbh(odd, even); }

template <int K, int kFirst, int... C>
HYPER_INLINE void decode_packed_row(const PairOfRows<W, K>& pair, W::Vec multiplier, uint16_t* weights,
                                    std::integer_sequence<int, C...>) {
  const W::Float weight[kTile] = {W::to_float(W::centred_sum(pair.template hash<kFirst + C>(multiplier)))...};
  HYPER_UNROLL
  for (int p = 0; p < kGroupSteps; ++p) {
    _mm512_storeu_si512(weights + p * kDenseRows * kStepValues, joined(weight[2 * p], weight[2 * p + 1]));
  }
}

template <int K>
void decode_packed(const uint32_t* codes, int64_t groups, uint32_t multiplier, int64_t first, int64_t steps,
                   uint16_t* weights) {
  using Columns = std::make_integer_sequence<int, kTile>;
  const W::Vec factor = W::set1(multiplier);
  alignas(64) uint32_t words[(8 * K + 1) * W::kLanes];
  for (int64_t g = 0; g < groups; ++g) {
    transpose_group<W, K>(codes + g * 8 * K * W::kLanes, words);
    for (int p = 0; p < 8; ++p) {
      prefetch_codes<W, K>(codes + g * 8 * K * W::kLanes, p);
      const PairOfRows<W, K> pair(words + p * K * W::kLanes);
      const int row = 2 * p;
      uint16_t* to = weights + (((row / kDenseRows) * steps + first + g * kGroupSteps) * kDenseRows + row % kDenseRows) *
                                   kStepValues;
      decode_packed_row<K, 0>(pair, factor, to, Columns());
      decode_packed_row<K, kTile>(pair, factor, to + kStepValues, Columns());
    }
  }
}

void arrange_packed(const float* values, int64_t groups, int token, int tokens, uint16_t* activations) {
  constexpr int kBlock = kTile * W::kLanes;
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(values) + g * kBlock;
    W::Vec column[kTile];
    HYPER_UNROLL
    for (int c = 0; c < kTile; c += 4) W::gather4(from + c, kTile, column + c);
    HYPER_UNROLL
    for (int p = 0; p < kGroupSteps; ++p) {
      uint16_t* to = activations + ((g * kGroupSteps + p) * tokens + token) * kStepValues;
      _mm512_storeu_si512(to, joined(_mm512_castsi512_ps(column[2 * p]), _mm512_castsi512_ps(column[2 * p + 1])));
    }
  }
}

template <int T>
void multiply_packed(const uint16_t* weights, const uint16_t* activations, int64_t steps, bool fresh,
                     float* sums) {
  __m512 sum[kDenseRows][T];
  HYPER_UNROLL
  for (int r = 0; r < kDenseRows; ++r) {
    HYPER_UNROLL
    for (int t = 0; t < T; ++t) {
      sum[r][t] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (r * T + t) * 16);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    __m512bh row[kDenseRows];
    HYPER_UNROLL
    for (int r = 0; r < kDenseRows; ++r) row[r] = (__m512bh)_mm512_loadu_si512(weights + r * kStepValues);
    HYPER_UNROLL
    for (int t = 0; t < T; ++t) {
      const __m512bh x = (__m512bh)_mm512_loadu_si512(activations + t * kStepValues);
      HYPER_UNROLL
      for (int r = 0; r < kDenseRows; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], row[r], x);
    }
    weights += kDenseRows * kStepValues;
    activations += T * kStepValues;
  }
  HYPER_UNROLL
  for (int r = 0; r < kDenseRows; ++r) {
    HYPER_UNROLL
    for (int t = 0; t < T; ++t) _mm512_storeu_ps(sums + (r * T + t) * 16, sum[r][t]);
  }
}

void finish_packed(const float* sums, int token, int tokens, float offset, const float* units, float* rows) {
  __m512 totals = _mm512_setzero_ps();
  // Four rows at a time: after a transposition of 4 x 4 blocks, lane 4q + r holds quarter q of row r.
  HYPER_UNROLL
  for (int q = 0; q < 4; ++q) {
    __m512 row[4];
    HYPER_UNROLL
    for (int i = 0; i < 4; ++i) row[i] = _mm512_loadu_ps(sums + ((4 * q + i) * tokens + token) * 16);
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(row[0], row[1]), _mm512_unpackhi_ps(row[0], row[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(row[2], row[3]), _mm512_unpackhi_ps(row[2], row[3]));
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    totals = _mm512_mask_broadcast_f32x4(totals, static_cast<__mmask16>(15 << 4 * q), four);
  }
  const __m512 centred = _mm512_sub_ps(totals, _mm512_set1_ps(offset));
  _mm512_storeu_ps(rows, _mm512_mul_ps(centred, _mm512_loadu_ps(units)));
}

template <int... K, int... T>
constexpr DenseSteps dense_table(std::integer_sequence<int, K...>, std::integer_sequence<int, T...>) {
  return {{decode_packed<K + 1>...}, arrange_packed, {multiply_packed<T + 1>...}, finish_packed};
}

}  // namespace

extern const DenseSteps kDenseAvx512;
const DenseSteps kDenseAvx512 =
    dense_table(std::make_integer_sequence<int, 8>(), std::make_integer_sequence<int, kDenseTokens>());

}  // namespace hyper
