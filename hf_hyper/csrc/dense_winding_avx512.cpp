// Panels of `winding` for products for many tokens: AVX-512 with BF16.
//
// Lanes are rows. A code then lies in the same bits of the same word in all lanes, and decoded pairs are the steps of a
// panel as they stand; only the words have to be transposed, which are fewer.
#include "dense_steps.h"
#include "winding_steps_inl.h"

namespace hyper {
namespace {

constexpr int kMaxPanelWords = (kPairColumns / 2 * kMaxWindingWidth + 31) / 32 + 1;
constexpr int kBlock = 16;  // words transposed at a time

// Word j of 16 rows -> lanes of out[j], for 16 words; those that are not `wanted` are not read, and zeros.
HYPER_INLINE void transpose_words(const uint32_t* const rows[16], int64_t first, __mmask16 wanted, __m512i* out) {
  __m512i part[4][4];  // [four rows][column of every 128-bit lane]
  HYPER_UNROLL
  for (int q = 0; q < 4; ++q) {
    __m512i in[4];
    HYPER_UNROLL
    for (int i = 0; i < 4; ++i) in[i] = _mm512_maskz_loadu_epi32(wanted, rows[4 * q + i] + first);
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
    out[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    out[4 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
    out[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    out[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// Pairs of weights, rounded: the first of each in the lower half.
HYPER_INLINE __m512i rounded_pairs(const Floats weight[2]) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512 even, odd;
  std::memcpy(&even, &weight[0], sizeof even);
  std::memcpy(&odd, &weight[1], sizeof odd);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

template <bool kNear>
void decode_panel(const WindingConstants& shared, const uint32_t* const rows[16], int64_t row_words, int64_t first_pair,
                  int64_t pairs, uint16_t* weights) {
  const WindingConstants constants = shared;  // stays in registers: no store may reach it
  const int64_t width = constants.width, first_bit = first_pair * width, first_word = first_bit / 32;
  const int64_t words = (first_bit % 32 + pairs * width + 31) / 32;
  __m512i lanes[1 + (kMaxPanelWords + kBlock - 1) / kBlock * kBlock];  // the first has no meaning
  lanes[0] = _mm512_setzero_si512();
  for (int64_t word = 0; word < words; word += kBlock) {
    const int64_t left = row_words - first_word - word;
    const __mmask16 wanted = static_cast<__mmask16>(left >= kBlock ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0);
    for (int r = 0; r < 16; ++r) __builtin_prefetch(rows[r] + first_word + words + word);
    transpose_words(rows, first_word + word, wanted, lanes + 1 + word);
  }
  uint64_t last_bit = static_cast<uint64_t>(first_bit % 32 + width - 1);
  for (int64_t p = 0; p < pairs; ++p, last_bit += static_cast<uint64_t>(width), weights += kStepValues) {
    const __m512i* word = lanes + 1 + last_bit / 32;
    const int below = static_cast<int>(31 - last_bit % 32);
    const __m512i found = _mm512_shrdv_epi32(word[0], word[-1], _mm512_set1_epi32(below));
    Words codes;
    std::memcpy(&codes, &found, sizeof codes);
    Points points;
    locate<kNear>(constants, codes, points);
    Floats weight[2];
    weigh(constants, points, weight);
    _mm512_store_si512(weights, rounded_pairs(weight));
  }
}

}  // namespace

extern const DecodeWinding kDecodeWindingAvx512[2];
const DecodeWinding kDecodeWindingAvx512[2] = {decode_panel<false>, decode_panel<true>};

}  // namespace hyper
