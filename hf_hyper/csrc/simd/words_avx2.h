// Vector class of 8 lanes of 32 bits: AVX2 with FMA. Meaning of the operations: simd/words_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

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
  static Float spread(const uint32_t* p) { return _mm256_castsi256_ps(set1(*p)); }

  template <int kCount>
  static void deinterleave(const uint32_t* p, Vec out[kCount]) {
    Vec in[kCount];
    for (int i = 0; i < kCount; ++i) in[i] = load(p + kLanes * i);
    pick_all<kCount>(in, out, std::make_integer_sequence<int, kCount>());
  }
  template <int kRing>
  static Vec previous(Vec last, uint32_t before) {
    const Vec turned = _mm256_permutevar8x32_epi32(last, _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
    return kRing == kLanes ? turned : _mm256_blend_epi32(turned, set1(before), 1);
  }
  static constexpr int kHalvesUpTo = 0;
  static void scatter4(const Vec in[4], uint32_t* p, int64_t stride) {
    Vec quad[4];
    transpose4(in, quad);
    for (int q = 0; q < 4; ++q) {
      put(p + q * stride, _mm256_castsi256_si128(quad[q]));
      put(p + (q + 4) * stride, _mm256_extracti128_si256(quad[q], 1));
    }
  }

  static Vec high(Vec word) { return _mm256_srli_epi32(word, 16); }
  template <int kShift, int>
  static Vec within(Vec word) {
    return low_half(_mm256_srli_epi32(word, kShift));
  }
  template <int kShift, int>
  static Vec across(Vec before, Vec high) {
    return low_half(_mm256_srli_epi32(_mm256_or_si256(_mm256_slli_epi32(before, 16), high), kShift));
  }
  static Vec multiply(Vec a, Vec b) { return _mm256_mullo_epi32(a, b); }

  static Vec centred_sum(Vec hash) {
    return _mm256_sub_epi32(byte_sum(hash), _mm256_set1_epi32(510));
  }
  static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static Float to_float(Vec a) { return _mm256_cvtepi32_ps(a); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }

  // Pairs of bytes are added first: pairs of products of bytes would saturate 16 bits.
  static uint32_t activation(int32_t q) { return (static_cast<uint32_t>(q) & 65535) * 0x00010001u; }
  static Vec dot(Vec acc, Vec hash, Vec activation) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pair_sums(hash), activation));
  }

  static constexpr bool kPairs = true;
  static Vec byte_sums(Vec a, Vec b) { return _mm256_or_si256(byte_sum(a), _mm256_slli_epi32(byte_sum(b), 16)); }
  static Vec dot_pair(Vec acc, Vec sums, const uint32_t* activations) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sums, set1(*activations)));
  }

  static Vec pack_bfloat16(Float even, Float odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xAA);
  }
  static Vec bits(Float a) { return _mm256_castps_si256(a); }

 private:
  static Vec low_half(Vec a) { return _mm256_and_si256(a, set1(65535)); }
  static Vec pair_sums(Vec hash) { return _mm256_maddubs_epi16(hash, _mm256_set1_epi8(1)); }
  static Vec byte_sum(Vec hash) { return _mm256_madd_epi16(pair_sums(hash), _mm256_set1_epi16(1)); }
  // Even lanes of two vectors, and odd ones.
  static void pick_halves(Vec a, Vec b, Vec* even, Vec* odd) {
    const Float x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    *even = _mm256_permute4x64_epi64(bits(_mm256_shuffle_ps(x, y, 0x88)), 0xD8);
    *odd = _mm256_permute4x64_epi64(bits(_mm256_shuffle_ps(x, y, 0xDD)), 0xD8);
  }
  template <int kCount, int... C>
  static void pick_all(const Vec in[kCount], Vec out[kCount], std::integer_sequence<int, C...>) {
    if constexpr (kCount == 1) {
      out[0] = in[0];
    } else if constexpr (kCount % 2 == 1) {
      ((out[C] = pick<kCount, C>(in, std::make_integer_sequence<int, kCount>())), ...);
    } else if constexpr (kCount == 2) {
      pick_halves(in[0], in[1], out, out + 1);
    } else {
      static_assert(kCount == 4, "lanes of up to 4 words at even rates");
      Vec even[2], odd[2];
      for (int i = 0; i < 2; ++i) pick_halves(in[2 * i], in[2 * i + 1], even + i, odd + i);
      pick_halves(even[0], even[1], out, out + 2);
      pick_halves(odd[0], odd[1], out + 1, out + 3);
    }
  }
  // An odd step meets every lane once in kCount vectors: blend, then one permutation.
  template <int kCount, int kFirst, int... S>
  static Vec pick(const Vec in[kCount], std::integer_sequence<int, S...>) {
    Vec joined = in[0];
    ((joined = _mm256_blend_epi32(joined, in[S], (taken<kCount, kFirst, S>))), ...);
    constexpr auto at = [](int i) { return (kFirst + kCount * i) % kLanes; };
    return _mm256_permutevar8x32_epi32(joined,
                                       _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
  }
  template <int kCount, int kFirst, int S>
  static constexpr int taken = [] {
    int mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= ((kLanes * S + i) % kCount == kFirst) << i;
    return mask;
  }();
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
