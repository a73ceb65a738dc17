// Vector class of 32 lanes: AVX-512 BW. Meaning of the operations: simd/portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hyper {
namespace {

struct Avx512 {
  static constexpr int kLanes = 32;
  using Vec = __m512i;

  static Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Vec a) { _mm512_storeu_si512(p, a); }
  static Vec set1(int16_t x) { return _mm512_set1_epi16(x); }
  static Vec iota() {
    return _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9,
                            8, 7, 6, 5, 4, 3, 2, 1, 0);
  }

  static Vec add(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
  static Vec bit_and(Vec a, Vec b) { return _mm512_and_si512(a, b); }
  static Vec bit_or(Vec a, Vec b) { return _mm512_or_si512(a, b); }
  template <int kCount>
  static Vec shift_left(Vec a) {
    return _mm512_slli_epi16(a, kCount);
  }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_epi16(a, b); }
  static Vec add_sat(Vec a, Vec b) { return _mm512_adds_epu16(a, b); }
  static Vec min(Vec a, Vec b) { return _mm512_min_epu16(a, b); }
  static uint16_t reduce_min(Vec a) {
    const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(quarter), 0));
  }
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_mov_epi16(y, _mm512_cmplt_epu16_mask(a, b), x);
  }
  static void store_less(uint8_t* p, Vec a, Vec b) {
    const uint32_t mask = _mm512_cmplt_epu16_mask(a, b);
    std::memcpy(p, &mask, sizeof mask);
  }

  static Vec sub_sat(Vec a, Vec b) { return _mm512_subs_epi16(a, b); }
  static Vec abs(Vec a) { return _mm512_abs_epi16(a); }
  static Vec mul_round_high(Vec a, Vec b) { return _mm512_mulhrs_epi16(a, b); }
  static Vec mul_low(Vec a, Vec b) { return _mm512_mullo_epi16(a, b); }

  // The entries are broadcast to every 128-bit lane, which picks its own with one byte shuffle: memory broadcasts are
  // free and Zen 4 runs two such shuffles a cycle, against one cross-lane permutation.
  template <int kBits>
  static Vec expand(const uint16_t* p) {
    if constexpr (kBits == 1) {
      const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      return _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 16));
    } else if constexpr (kBits == 2) {
      const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm512_shuffle_epi8(all, picks(0x0100010001000100, 0x0302030203020302, 0x0404040404040404));
    } else if constexpr (kBits == 3) {
      return _mm512_shuffle_epi8(_mm512_set1_epi64(read<int64_t>(p)),
                                 picks(0x0100010001000100, 0x0100010001000100, 0x0202020202020202));
    } else if constexpr (kBits == 4) {
      const __m512i indices = _mm512_inserti64x4(_mm512_set1_epi16(0x0100), _mm256_set1_epi16(0x0302), 1);
      return _mm512_shuffle_epi8(_mm512_set1_epi32(read<int32_t>(p)), indices);
    } else {
      return _mm512_set1_epi16(read<int16_t>(p));
    }
  }
  template <int kBits>
  static Vec follow(const int16_t* table, const uint16_t* window) {
    const auto from = [=](int i) { return table + (window[i] << kBits & 65535); };
    // Single loads joined by shuffles: half as fast again at 2 bits as a gather instruction (Zen 4).
    if constexpr (kBits == 1) {
      const auto two = [=](int i) {
        return _mm_unpacklo_epi32(_mm_cvtsi32_si128(read<int32_t>(from(i))),
                                  _mm_cvtsi32_si128(read<int32_t>(from(i + 1))));
      };
      const auto four = [=](int i) { return _mm_unpacklo_epi64(two(i), two(i + 2)); };
      return join(four(0), four(4), four(8), four(12));
    } else if constexpr (kBits == 2) {
      const auto two = [=](int i) {
        return _mm_unpacklo_epi64(_mm_cvtsi64_si128(read<int64_t>(from(i))),
                                  _mm_cvtsi64_si128(read<int64_t>(from(i + 1))));
      };
      return join(two(0), two(2), two(4), two(6));
    } else if constexpr (kBits == 3) {
      return join(load128(from(0)), load128(from(1)), load128(from(2)), load128(from(3)));
    } else if constexpr (kBits == 4) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from(0)));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from(1)));
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    } else {
      return load(from(0));
    }
  }

 private:
  static Vec join(__m128i a, __m128i b, __m128i c, __m128i d) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_setr_m128i(a, b)), _mm256_setr_m128i(c, d), 1);
  }
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  template <class T>
  static T read(const void* p) {
    T out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
  // Byte indices: lane i of 128 bits gets (low, high) + i * step.
  static Vec picks(int64_t low, int64_t high, int64_t step) {
    return _mm512_setr_epi64(low, high, low + step, high + step, low + 2 * step, high + 2 * step, low + 3 * step,
                             high + 3 * step);
  }
};

}  // namespace
}  // namespace hyper
