// Products for many tokens: AVX-512 with BF16.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "dense_steps.h"
#include "rotation_inl.h"
#include "shift_lanes_inl.h"
#include "simd/words_avx512.h"

namespace hyper {
namespace {

using W = WordsAvx512;

// Pairs of lanes of `even` and `odd`, rounded.
HYPER_INLINE __m512i pairs(W::Float even, W::Float odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// `wanted` bits of `from`, the others of `step`.
HYPER_INLINE __m512i byte_from(__m512i step, __m512i from, uint32_t wanted) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(wanted)), from, step, 0xCA);
}

// 16 columns of the row in every lane.
template <int K, int... C>
HYPER_INLINE void decode_row(const LaneWords<W, K>& words, W::Vec multiplier, uint16_t* weights,
                             std::integer_sequence<int, C...>) {
  const W::Float weight[kTile] = {W::to_float(W::centred_sum(W::multiply(words.template state<C>(), multiplier)))...};
  HYPER_UNROLL
  for (int c = 0; c < kTile; c += 2) {
    _mm512_store_si512(weights + c / 2 * kStepValues, pairs(weight[c], weight[c + 1]));
  }
}

template <int K, int... C>
HYPER_INLINE void decode_row(const LaneWords<W, K>& words, W::Vec multiplier, uint8_t* weights,
                             std::integer_sequence<int, C...>) {
  const W::Vec sum[kTile] = {
      _mm512_dpbusd_epi32(_mm512_set1_epi32(2), W::multiply(words.template state<C>(), multiplier),
                          _mm512_set1_epi8(1))...};  // quarters in bits 2 to 9
  HYPER_UNROLL
  for (int c = 0; c < kTile; c += 4) {
    W::Vec step = _mm512_srli_epi32(sum[c], 2);
    step = byte_from(step, _mm512_slli_epi32(sum[c + 1], 6), 0xff00);
    step = byte_from(step, _mm512_slli_epi32(sum[c + 2], 14), 0xff0000);
    step = byte_from(step, _mm512_slli_epi32(sum[c + 3], 22), 0xff000000);
    _mm512_store_si512(weights + c / 4 * kStepBytes, step);
  }
}

template <class Weight, int K>
void decode_shift(const uint32_t* codes, int64_t next, int64_t in_tiles, uint32_t multiplier, Weight* weights) {
  using Columns = std::make_integer_sequence<int, kTile>;
  static_assert(Lanes<W, K>::kRows == 1 && Lanes<W, K>::kVectors == 1, "a row in every lane");
  constexpr int kVector = kStepBytes / 2 / sizeof(Weight), kTileSteps = kTile * sizeof(Weight) / 4;
  const W::Vec factor = W::set1(multiplier);
  for (int64_t t = 0; t < in_tiles; ++t, codes += 8 * K, weights += kTileSteps * 2 * kVector) {
    prefetch_ahead<K>(codes);
    prefetch_ahead<K>(codes + next);
    decode_row(LaneWords<W, K>(codes, 0), factor, weights, Columns());
    decode_row(LaneWords<W, K>(codes + next, 0), factor, weights + kVector, Columns());
  }
}

struct RoundedTo {
  static constexpr int kWide = 1;
  uint16_t* to;
  HYPER_INLINE void operator()(int64_t i, const Float16Lanes* lanes) const {
    store_lanes(*lanes, kTile, HYPER_BFLOAT16, to, i);
  }
};

// Even and odd columns.
struct JoinedTo {
  static constexpr int kWide = 2;
  uint16_t* to;
  HYPER_INLINE void operator()(int64_t i, const Float16Lanes* lanes) const {
    _mm512_storeu_si512(to + i, pairs((__m512)lanes[0], (__m512)lanes[1]));
  }
};

// The same times a factor.
struct ScaledTo {
  static constexpr int kWide = 2;
  uint16_t* to;
  float factor;
  HYPER_INLINE void operator()(int64_t i, const Float16Lanes* lanes) const {
    const Float16Lanes scaled[2] = {lanes[0] * factor, lanes[1] * factor};
    JoinedTo{to}(i, scaled);
  }
};

// A dot product of pairs with the signs is the first stage of the transform of bfloat16 numbers, and their signs and scale
// too: two of them, one with all odd signs changed, give sums and differences of 16 pairs of neighbours. These stay apart,
// as even and odd columns, until they are rounded.
HYPER_INLINE void load_pairs(const uint16_t* x, const uint16_t* signs, Float16Lanes* lanes) {
  const __m512i all = _mm512_loadu_si512(x), changed = _mm512_xor_si512(all, _mm512_set1_epi32(INT32_MIN));
  const __m512bh by = (__m512bh)_mm512_loadu_si512(signs);
  lanes[0] = (Float16Lanes)_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)all, by);
  lanes[1] = (Float16Lanes)_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)changed, by);
}

float rotate_and_round(const hyper_shift_plan& plan, const void* x, int dtype, float* values, uint16_t* rotated) {
  const InputSide side(plan);
  if (dtype == HYPER_BFLOAT16 && side.padded == plan.in_features && side.power >= 32) {
    const auto* from = static_cast<const uint16_t*>(x);
    const uint16_t* signs = plan.signs_in;
    short_hadamard<2>(
        side.padded, side.run,
        [=](int64_t i, Float16Lanes* lanes) HYPER_INLINE_LAMBDA { load_pairs(from + i, signs + i, lanes); },
        [=](int64_t i, const Float16Lanes& lanes) HYPER_INLINE_LAMBDA { store16(values + i, lanes); });
    const float rest = plan.scales_in[0] / from_bfloat16(signs[0]);
    if (rest == 1) {
      rotate_from_runs(plan, side, values, JoinedTo{rotated});
    } else {
      rotate_from_runs(plan, side, values, ScaledTo{rotated, rest});
    }
  } else {
    rotate(plan, x, dtype, values, RoundedTo{rotated});
  }
  return rotated_sum(plan, x, dtype);
}

void round(const float* values, int64_t columns, uint16_t* activations) {
  hand_over(values, columns, RoundedTo{activations});
}

double round_bytes(const float* values, int64_t columns, int8_t* activations, ByteScale* scale) {
  __m512i most = _mm512_setzero_si512();  // magnitudes as integers: NaN is the largest
  for (int64_t i = 0; i < columns; i += 16) {
    const __m512i bits = _mm512_loadu_si512(values + i);
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const __m512 factor = _mm512_set1_ps(largest > 1e-30f ? 127 / largest : 0);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < columns; i += 16) {
    const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), factor));
    const __m512i rounded = _mm512_max_epi32(integers, _mm512_set1_epi32(-127));  // a product that is NaN is the least
    total = _mm512_add_epi32(total, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(activations + i), _mm512_cvtsepi32_epi8(rounded));
  }
  const int32_t sum = _mm512_reduce_add_epi32(total);
  *scale = {largest / 127, -kQuarterCentre * sum};
  return static_cast<double>(scale->unit) * sum;
}

template <int T>
void multiply(const uint16_t* weights, const uint16_t* activations, int64_t steps, bool fresh, float* sums) {
  constexpr int kChains = T <= 3 ? 2 : 1;  // enough independent sums to hide the latency
  __m512 sum[kChains][T][2];
  HYPER_UNROLL
  for (int t = 0; t < T; ++t) {
    HYPER_UNROLL
    for (int v = 0; v < 2; ++v) {
      sum[0][t][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (2 * t + v) * 16);
      if constexpr (kChains == 2) sum[1][t][v] = _mm512_setzero_ps();
    }
  }
  for (int64_t s = 0; s < steps; s += kChains) {
    HYPER_UNROLL
    for (int i = 0; i < kChains; ++i) {
      const __m512bh row[2] = {(__m512bh)_mm512_load_si512(weights), (__m512bh)_mm512_load_si512(weights + 32)};
      HYPER_UNROLL
      for (int t = 0; t < T; ++t) {
        int pair;
        std::memcpy(&pair, activations + t * kPairColumns, sizeof pair);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        sum[i][t][0] = _mm512_dpbf16_ps(sum[i][t][0], row[0], x);
        sum[i][t][1] = _mm512_dpbf16_ps(sum[i][t][1], row[1], x);
      }
      weights += kStepValues;
      activations += 2;
    }
  }
  HYPER_UNROLL
  for (int t = 0; t < T; ++t) {
    HYPER_UNROLL
    for (int v = 0; v < 2; ++v) {
      if constexpr (kChains == 2) sum[0][t][v] = _mm512_add_ps(sum[0][t][v], sum[1][t][v]);
      _mm512_storeu_ps(sums + (2 * t + v) * 16, sum[0][t][v]);
    }
  }
}

// sum += dot products of four bytes. As an intrinsic, gcc 12 moves every sum through memory.
HYPER_INLINE void add_dots(__m512i& sum, __m512i weights, __m512i activations) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activations));
}

template <int T>
void multiply_bytes(const uint8_t* weights, const int8_t* activations, const ByteScale* scales, int64_t steps,
                    bool fresh, float* sums) {
  __m512i sum[T][2];
  HYPER_UNROLL
  for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm512_set1_epi32(scales[t].centre);
  for (int64_t s = 0; s < steps; ++s, weights += kStepBytes, activations += 4) {
    const __m512i row[2] = {_mm512_load_si512(weights), _mm512_load_si512(weights + 64)};
    HYPER_UNROLL
    for (int t = 0; t < T; ++t) {
      int four;
      std::memcpy(&four, activations + t * kByteColumns, sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
      add_dots(sum[t][0], row[0], x);
      add_dots(sum[t][1], row[1], x);
    }
  }
  HYPER_UNROLL
  for (int t = 0; t < T; ++t) {
    HYPER_UNROLL
    for (int v = 0; v < 2; ++v) {
      float* to = sums + (2 * t + v) * 16;
      const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][v]), _mm512_set1_ps(scales[t].unit), before));
    }
  }
}

void finish_shift(const hyper_shift_plan& plan, int64_t first, int64_t count, const float* sums, int64_t tokens,
                  float offset, const float* totals, const float* units, const uint16_t* out_scale, int dtype,
                  void* out) {
  float factors[kStripeRows];
  output_factors(plan, first, count, out_scale, factors);
  for (int64_t m = 0; m < tokens; ++m, sums += kPanelRows) {
    const float less = offset * totals[m];
    rotate_rows(plan, first, count, factors, dtype, out, m, [=](int64_t i, Float16Lanes* lanes) HYPER_INLINE_LAMBDA {
      load16(*lanes, sums + i / kPanelRows * tokens * kPanelRows + i % kPanelRows);
      Float16Lanes unit;
      load16(unit, units + i);
      *lanes = (*lanes - less) * unit;
    });
  }
}

void store(const float* sums, int64_t tokens, int64_t rows, int dtype, void* y, int64_t first, int64_t stride) {
  for (int64_t m = 0; m < tokens; ++m, sums += kPanelRows, first += stride) {
    for (int64_t r = 0; r < rows; r += kTile) {
      Float16Lanes lanes;
      load16(lanes, sums + r);
      store_lanes(lanes, rows - r, dtype, y, first + r);
    }
  }
}

template <int... K, int... T>
constexpr DenseSteps dense_table(std::integer_sequence<int, K...>, std::integer_sequence<int, T...>) {
  return {{decode_shift<uint16_t, K + 1>...},
          {decode_shift<uint8_t, K + 1>...},
          load_as_float,
          rotate,
          rotate_and_round,
          round,
          round_bytes,
          {multiply<T + 1>...},
          {multiply_bytes<T + 1>...},
          finish_shift,
          store};
}

}  // namespace

extern const DenseSteps kDenseAvx512;
const DenseSteps kDenseAvx512 =
    dense_table(std::make_integer_sequence<int, 8>(), std::make_integer_sequence<int, kDenseTokens>());

}  // namespace hyper
