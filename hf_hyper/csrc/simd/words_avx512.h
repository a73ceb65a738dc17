// Vector class of 16 lanes of 32 bits: AVX-512 with VNNI and VBMI2. Meaning of the operations: simd/words_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

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
  static Float spread(const uint32_t* p) { return _mm512_castsi512_ps(set1(*p)); }

  template <int kCount>
  static void deinterleave(const uint32_t* p, Vec out[kCount]) {
    Vec in[kCount];
    for (int i = 0; i < kCount; ++i) in[i] = load(p + kLanes * i);
    pick_all<kCount>(in, out, std::make_integer_sequence<int, kCount>());
  }
  // The lower lanes from p, the upper ones from q.
  template <int kCount>
  static void deinterleave(const uint32_t* p, const uint32_t* q, Vec out[kCount]) {
    static_assert(kCount % 2 == 1, "half a vector of each meets in the middle");
    Vec in[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      in[i] = load(p + kLanes * i);
      in[kCount - 1 - i] = load(q + 8 * kCount - kLanes * (i + 1));
    }
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * (kCount - 1)));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    in[kCount / 2] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    pick_all<kCount>(in, out, std::make_integer_sequence<int, kCount>());
  }
  template <int kRing>
  static Vec previous(Vec last, uint32_t) {
    if constexpr (kRing == 16) {
      return _mm512_alignr_epi32(last, last, 15);
    } else {
      return _mm512_permutexvar_epi32(_mm512_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6, 15, 8, 9, 10, 11, 12, 13, 14), last);
    }
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

  static Vec high(Vec word) { return _mm512_srli_epi32(word, 16); }
  template <int kShift, int kBits>
  static Vec within(Vec word) {
    return cut<kShift, kBits>(word);
  }
  // The double shift of 16-bit halves is shift, merge and mask in one, but runs on the units that multiply (Zen 4 and 5):
  // it pays at rates where windows do not share shifts, at 3 bits at two borders of three.
  template <int kShift, int kBits>
  static Vec across(Vec before, Vec high) {
    if constexpr (kBits >= 5 || (kBits == 3 && kShift % 3 != 2)) {
      return _mm512_maskz_shrdi_epi16(0x55555555, high, before, kShift);
    }
    return cut<kShift, kBits>(_mm512_or_si512(_mm512_slli_epi32(before, 16), high));
  }
  static Vec multiply(Vec a, Vec b) { return _mm512_mullo_epi32(a, b); }

  static Vec centred_sum(Vec hash) {
    return _mm512_dpbusd_epi32(_mm512_set1_epi32(-510), hash, _mm512_set1_epi8(1));
  }
  static Float to_float(Vec a) { return _mm512_cvtepi32_ps(a); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }

  static uint32_t activation(int32_t q) { return (static_cast<uint32_t>(q) & 255) * 0x01010101u; }
  static Vec dot(Vec acc, Vec hash, Vec activation) { return _mm512_dpbusd_epi32(acc, hash, activation); }

  static constexpr bool kPairs = true;
  static Vec byte_sums(Vec a, Vec b) {
    const Vec zero = _mm512_setzero_si512();
    return _mm512_mask_dbsad_epu8(_mm512_dbsad_epu8(a, zero, 0), 0xAAAAAAAA, b, zero, 0);
  }
  static Vec dot_pair(Vec acc, Vec sums, const uint32_t* activations) {
    return _mm512_dpwssd_epi32(acc, sums, set1(*activations));
  }

  static Vec pack_bfloat16(Float even, Float odd) {
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(rounded(even), 16), 0xAAAAAAAA, rounded(odd));
  }
  static Vec bits(Float a) { return _mm512_castps_si512(a); }

 private:
  // The 16 bits that end kShift bits above the end of every word. Whole bytes need no shift, and windows that are a byte
  // apart, as some are where the rate divides 8, share one.
  template <int kShift, int kBits>
  static Vec cut(Vec word) {
    if constexpr (kShift == 8 || (kShift > 8 && 8 % kBits == 0)) {
      const Vec shifted = kShift == 8 ? word : _mm512_srli_epi32(word, kShift - 8);
      return _mm512_shuffle_epi8(shifted, _mm512_set4_epi32(-0x7f7ff1f3, -0x7f7ff5f7, -0x7f7ff9fb, -0x7f7ffdff));
    } else {
      return low_half(kShift == 0 ? word : _mm512_srli_epi32(word, kShift));
    }
  }
  static Vec low_half(Vec a) { return _mm512_and_si512(a, _mm512_set1_epi32(65535)); }
  // Lanes first, first + step, ... of a sequence of vectors, modulo kModulo.
  template <int kFirst, int kStep, int kModulo>
  static Vec picks() {
    constexpr auto at = [](int i) { return (kFirst + kStep * i) % kModulo; };
    return _mm512_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11),
                             at(12), at(13), at(14), at(15));
  }
  template <int kFirst>
  static Vec pick_half(Vec a, Vec b) {
    return _mm512_permutex2var_epi32(a, picks<kFirst, 2, 32>(), b);
  }
  template <int kCount, int... C>
  static void pick_all(const Vec in[kCount], Vec out[kCount], std::integer_sequence<int, C...>) {
    if constexpr (kCount == 1) {
      out[0] = in[0];
    } else if constexpr (kCount % 2 == 1) {
      ((out[C] = pick<kCount, C>(in, std::make_integer_sequence<int, kCount>())), ...);
    } else if constexpr (kCount == 2) {
      out[0] = pick_half<0>(in[0], in[1]);
      out[1] = pick_half<1>(in[0], in[1]);
    } else {
      static_assert(kCount == 4, "lanes of up to 4 words at even rates");
      const Vec even[2] = {pick_half<0>(in[0], in[1]), pick_half<0>(in[2], in[3])};
      const Vec odd[2] = {pick_half<1>(in[0], in[1]), pick_half<1>(in[2], in[3])};
      out[0] = pick_half<0>(even[0], even[1]);
      out[1] = pick_half<0>(odd[0], odd[1]);
      out[2] = pick_half<1>(even[0], even[1]);
      out[3] = pick_half<1>(odd[0], odd[1]);
    }
  }
  // An odd step meets every lane once in kCount vectors: blend, then one permutation.
  template <int kCount, int kFirst, int... S>
  static Vec pick(const Vec in[kCount], std::integer_sequence<int, S...>) {
    Vec joined = in[0];
    ((joined = _mm512_mask_mov_epi32(joined, (taken<kCount, kFirst, S>), in[S])), ...);
    return _mm512_permutexvar_epi32(picks<kFirst, kCount, 16>(), joined);
  }
  template <int kCount, int kFirst, int S>
  static constexpr __mmask16 taken = [] {
    int mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= ((kLanes * S + i) % kCount == kFirst) << i;
    return static_cast<__mmask16>(mask);
  }();
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
