// Vector class of 16 lanes of 32 bits: AVX-512 with VNNI. Meaning of the operations: simd/words_portable.h.
#pragma once

#include <immintrin.h>

#include <array>
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
    static_assert(kCount == 4, "only 8 bits are read by words");
    const Vec in[kCount] = {load(p), load(p + kLanes), load(p + 2 * kLanes), load(p + 3 * kLanes)};
    const Vec even[2] = {pick_half<0>(in[0], in[1]), pick_half<0>(in[2], in[3])};
    const Vec odd[2] = {pick_half<1>(in[0], in[1]), pick_half<1>(in[2], in[3])};
    out[0] = pick_half<0>(even[0], even[1]);
    out[1] = pick_half<0>(odd[0], odd[1]);
    out[2] = pick_half<1>(even[0], even[1]);
    out[3] = pick_half<1>(odd[0], odd[1]);
  }
  template <int kRing>
  static Vec previous(Vec last, uint32_t) {
    static_assert(kRing == kLanes);
    return _mm512_alignr_epi32(last, last, 15);
  }
  static constexpr int kHalvesUpTo = 7;
  template <int K>
  static void adjacent_halves(const uint32_t* tile, Vec out[K]) {
    adjacent_halves<K>(tile, out, std::make_integer_sequence<int, K>());
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
  template <int kShift, int kBits>
  static Vec across(Vec before, Vec high) {
    return cut<kShift, kBits>(_mm512_or_si512(_mm512_slli_epi32(before, 16), high));
  }
  static Vec multiply(Vec a, Vec b) { return _mm512_mullo_epi32(a, b); }

  static Vec centred_sum(Vec hash) {
    return _mm512_dpbusd_epi32(_mm512_set1_epi32(-510), hash, _mm512_set1_epi8(1));
  }
  static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static Float to_float(Vec a) { return _mm512_cvtepi32_ps(a); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }

  static uint32_t activation(int32_t q) { return (static_cast<uint32_t>(q) & 255) * 0x01010101u; }
  static Vec dot(Vec acc, Vec hash, Vec activation) { return _mm512_dpbusd_epi32(acc, hash, activation); }

  static constexpr bool kPairs = true;
  static Vec byte_sums(Vec a, Vec b) {  // the second ones first: they go up, the others are added below
    const Vec zero = _mm512_setzero_si512(), one = _mm512_set1_epi8(1);
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(_mm512_dpbusd_epi32(zero, b, one), 16), a, one);
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
  // Every other lane of two vectors.
  template <int kFirst>
  static Vec pick_half(Vec a, Vec b) {
    constexpr auto at = [](int i) { return kFirst + 2 * i; };
    const Vec index = _mm512_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10),
                                        at(11), at(12), at(13), at(14), at(15));
    return _mm512_permutex2var_epi32(a, index, b);
  }
  template <int K, int... I>
  static void adjacent_halves(const uint32_t* tile, Vec out[K], std::integer_sequence<int, I...>) {
    Vec in[(K + 1) / 2];
    for (int v = 0; v < K / 2; ++v) in[v] = load(tile + kLanes * v);
    if constexpr (K % 2 == 1) in[K / 2] = load_lower(tile + kLanes * (K / 2));
    ((out[I] = adjacent<K, I>(in)), ...);
  }
  template <int K, int I>
  static Vec adjacent(const Vec* in) {
    alignas(64) static constexpr auto kAt = [] {  // where they lie among the 16-bit numbers of a tile
      std::array<uint16_t, 32> at{};
      for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>((i / 2 * K + I + 16 * K - i % 2) % (16 * K) ^ 1);
      return at;
    }();
    constexpr __mmask32 kBeyond = [] {  // the first two vectors
      __mmask32 mask = 0;
      for (int i = 0; i < 32; ++i) mask |= static_cast<__mmask32>(kAt[i] >= 64) << i;
      return mask;
    }();
    const Vec at = _mm512_load_si512(kAt.data());
    if constexpr (K <= 2) {
      return _mm512_permutexvar_epi16(at, in[0]);
    } else if constexpr (K <= 4) {
      return _mm512_permutex2var_epi16(in[0], at, in[1]);
    } else if constexpr (K <= 6) {
      return _mm512_mask_permutexvar_epi16(_mm512_permutex2var_epi16(in[0], at, in[1]), kBeyond, at, in[2]);
    } else {
      return _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(in[0], at, in[1]), kBeyond,
                                   _mm512_permutex2var_epi16(in[2], at, in[3]));
    }
  }
  static Vec load_lower(const uint32_t* p) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
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
