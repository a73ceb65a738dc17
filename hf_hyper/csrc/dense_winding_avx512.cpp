// Panels of `winding` for products for many tokens: AVX-512 with BF16.
#include "dense_steps.h"
#include "winding_steps_inl.h"

namespace hyper {
namespace {

// Pairs of weights, rounded: the first of each in the lower half.
HYPER_INLINE __m512i rounded_pairs(const Floats& first, const Floats& second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512 even, odd;
  std::memcpy(&even, &first, sizeof even);
  std::memcpy(&odd, &second, sizeof odd);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// rows[i] lane j -> out + j * stride, lane i.
HYPER_INLINE void transpose16(const uint32_t* rows, int64_t row_stride, uint16_t* out, int64_t stride) {
  __m512i part[4][4];  // [four rows][column of every 128-bit lane]
  HYPER_UNROLL
  for (int q = 0; q < 4; ++q) {
    __m512i in[4];
    HYPER_UNROLL
    for (int i = 0; i < 4; ++i) in[i] = _mm512_loadu_si512(rows + (4 * q + i) * row_stride);
    const __m512i a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpacklo_epi32(in[2], in[3]);
    const __m512i c = _mm512_unpackhi_epi32(in[0], in[1]), d = _mm512_unpackhi_epi32(in[2], in[3]);
    part[q][0] = _mm512_unpacklo_epi64(a, b);
    part[q][1] = _mm512_unpackhi_epi64(a, b);
    part[q][2] = _mm512_unpacklo_epi64(c, d);
    part[q][3] = _mm512_unpackhi_epi64(c, d);
  }
  HYPER_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(part[0][j], part[1][j], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(part[0][j], part[1][j], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(part[2][j], part[3][j], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(part[2][j], part[3][j], 0xEE);
    _mm512_storeu_si512(out + j * stride, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(out + (4 + j) * stride, _mm512_shuffle_i32x4(a, c, 0xDD));
    _mm512_storeu_si512(out + (8 + j) * stride, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(out + (12 + j) * stride, _mm512_shuffle_i32x4(b, d, 0xDD));
  }
}

template <bool kNear>
void decode_panel(const WindingConstants& constants, const uint32_t* const words[16], const int64_t available[16],
                  int64_t groups, int v, uint16_t* weights) {
  alignas(64) uint32_t pairs[16][kPanelSteps];
  for (int r = 0; r < 16; ++r) {
    for_groups(constants, words[r], available[r], groups, [&](int64_t group, const uint32_t* from, int phase) {
      Points points;
      locate<kNear>(constants, from, phase, points);
      Floats weight[2];
      weigh(constants, points, weight);
      _mm512_store_si512(pairs[r] + group * kPairs, rounded_pairs(weight[0], weight[1]));
    });
  }
  for (int64_t g = 0; g < groups; ++g) {
    transpose16(pairs[0] + g * kPairs, kPanelSteps, weights + g * kPairs * kStepValues + v * kStepValues / 2,
                kStepValues);
  }
}

}  // namespace

extern const DecodeWinding kDecodeWindingAvx512[2];
const DecodeWinding kDecodeWindingAvx512[2] = {decode_panel<false>, decode_panel<true>};

}  // namespace hyper
