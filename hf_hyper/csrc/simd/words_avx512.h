// Vector class of 16 lanes of 32 bits: AVX-512 with VNNI and VBMI2. Meaning of the operations: simd/words_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace hyper {
namespace {

struct WordsAvx512 {
  static constexpr int kLanes = 16;
  using Vec = __m512i;
  using Float = __m512;

  static Vec load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint32_t* p, Vec a) { _mm512_storeu_si512(p, a); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  static Vec set1(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Float zero() { return _mm512_setzero_ps(); }

  static void gather4(const uint32_t* p, int stride, Vec out[4]) {
    Vec quad[4];
    for (int q = 0; q < 4; ++q) {
      const uint32_t* from = p + q * stride;
      Vec v = _mm512_castsi128_si512(quarter(from));
      v = _mm512_inserti32x4(v, quarter(from + 4 * stride), 1);
      v = _mm512_inserti32x4(v, quarter(from + 8 * stride), 2);
      quad[q] = _mm512_inserti32x4(v, quarter(from + 12 * stride), 3);
    }
    transpose4(quad, out);
  }
  static void scatter4(const Vec in[4], uint32_t* p, int64_t stride) {
    Vec quad[4];
    transpose4(in, quad);
    for (int q = 0; q < 4; ++q) {
      uint32_t* to = p + q * stride;
      put(to, _mm512_castsi512_si128(quad[q]));
      put(to + 4 * stride, _mm512_extracti32x4_epi32(quad[q], 1));
      put(to + 8 * stride, _mm512_extracti32x4_epi32(quad[q], 2));
      put(to + 12 * stride, _mm512_extracti32x4_epi32(quad[q], 3));
    }
  }

  // The double shift of 16-bit halves, with the upper half masked away, is shift, merge and mask in one instruction.
  static Vec high(Vec word) { return _mm512_srli_epi32(word, 16); }
  template <int kShift>
  static Vec window(Vec before, Vec word, Vec high) {
    constexpr __mmask32 kLow = 0x55555555;
    if constexpr (kShift == 0) {
      return _mm512_maskz_mov_epi16(kLow, word);
    } else if constexpr (kShift < 16) {
      return _mm512_maskz_shrdi_epi16(kLow, word, high, kShift);
    } else if constexpr (kShift == 16) {
      return high;
    } else {
      return _mm512_maskz_shrdi_epi16(kLow, high, before, kShift - 16);
    }
  }
  static Vec multiply(Vec a, Vec b) { return _mm512_mullo_epi32(a, b); }

  static Vec centred_sum(Vec hash) {
    return _mm512_dpbusd_epi32(_mm512_set1_epi32(-510), hash, _mm512_set1_epi8(1));
  }
  static Float to_float(Vec a) { return _mm512_cvtepi32_ps(a); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static float sum(Float a) { return _mm512_reduce_add_ps(a); }

  static uint32_t activation(int32_t q) { return (static_cast<uint32_t>(q) & 255) * 0x01010101u; }
  static Vec dot(Vec acc, Vec hash, Vec activation) { return _mm512_dpbusd_epi32(acc, hash, activation); }

  static Vec pack_bfloat16(Float even, Float odd) {
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(rounded(even), 16), 0xAAAAAAAA, rounded(odd));
  }
  static Vec bits(Float a) { return _mm512_castps_si512(a); }

 private:
  static __m128i quarter(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void put(uint32_t* p, __m128i a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
  static void transpose4(const Vec in[4], Vec out[4]) {
    const Vec a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpacklo_epi32(in[2], in[3]);
    const Vec c = _mm512_unpackhi_epi32(in[0], in[1]), d = _mm512_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
  }
  // Nearest bfloat16, ties to even, in the upper halves.
  static Vec rounded(Float a) {
    const Vec v = bits(a);
    const Vec even = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(0x7fff)), even);
  }
};

}  // namespace
}  // namespace hyper
