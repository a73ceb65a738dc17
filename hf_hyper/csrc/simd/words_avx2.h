// Vector class of 8 lanes of 32 bits: AVX2 with FMA. Meaning of the operations: simd/words_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace hyper {
namespace {

struct WordsAvx2 {
  static constexpr int kLanes = 8;
  using Vec = __m256i;
  using Float = __m256;

  static Vec load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vec*>(p)); }
  static void store(uint32_t* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<Vec*>(p), a); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  static Vec set1(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static Float zero() { return _mm256_setzero_ps(); }

  static void gather4(const uint32_t* p, int stride, Vec out[4]) {
    Vec quad[4];
    for (int q = 0; q < 4; ++q) {
      quad[q] = _mm256_inserti128_si256(_mm256_castsi128_si256(half(p + q * stride)), half(p + (q + 4) * stride), 1);
    }
    transpose4(quad, out);
  }
  static void scatter4(const Vec in[4], uint32_t* p, int64_t stride) {
    Vec quad[4];
    transpose4(in, quad);
    for (int q = 0; q < 4; ++q) {
      put(p + q * stride, _mm256_castsi256_si128(quad[q]));
      put(p + (q + 4) * stride, _mm256_extracti128_si256(quad[q], 1));
    }
  }

  static Vec high(Vec word) { return word; }
  template <int kShift>
  static Vec window(Vec before, Vec word, Vec) {
    if constexpr (kShift < 16) {
      return _mm256_and_si256(_mm256_srli_epi32(word, kShift), set1(65535));
    } else if constexpr (kShift == 16) {
      return _mm256_srli_epi32(word, 16);
    } else {
      const Vec joined = _mm256_or_si256(_mm256_slli_epi32(before, 32 - kShift), _mm256_srli_epi32(word, kShift));
      return _mm256_and_si256(joined, set1(65535));
    }
  }
  static Vec multiply(Vec a, Vec b) { return _mm256_mullo_epi32(a, b); }

  static Vec centred_sum(Vec hash) {
    return _mm256_sub_epi32(_mm256_madd_epi16(pair_sums(hash), _mm256_set1_epi16(1)), _mm256_set1_epi32(510));
  }
  static Float to_float(Vec a) { return _mm256_cvtepi32_ps(a); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static float sum(Float a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  // Pairs of bytes are added first: pairs of products of bytes would saturate 16 bits.
  static uint32_t activation(int32_t q) { return (static_cast<uint32_t>(q) & 65535) * 0x00010001u; }
  static Vec dot(Vec acc, Vec hash, Vec activation) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pair_sums(hash), activation));
  }

  static Vec pack_bfloat16(Float even, Float odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xAA);
  }
  static Vec bits(Float a) { return _mm256_castps_si256(a); }

 private:
  static Vec pair_sums(Vec hash) { return _mm256_maddubs_epi16(hash, _mm256_set1_epi8(1)); }
  static __m128i half(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void put(uint32_t* p, __m128i a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
  static void transpose4(const Vec in[4], Vec out[4]) {
    const Vec a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
    const Vec c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
  }
  // Nearest bfloat16, ties to even, in the upper halves.
  static Vec rounded(Float a) {
    const Vec v = bits(a);
    const Vec even = _mm256_and_si256(_mm256_srli_epi32(v, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(v, _mm256_set1_epi32(0x7fff)), even);
  }
};

}  // namespace
}  // namespace hyper
