// Vector class of 16 lanes: AVX2. Meaning of the operations: simd/portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hyper {
namespace {

struct Avx2 {
  static constexpr int kLanes = 16;
  using Vec = __m256i;

  static Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Vec a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static Vec set1(int16_t x) { return _mm256_set1_epi16(x); }
  static Vec iota() { return _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

  static Vec add(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_epi16(a, b); }
  static Vec bit_and(Vec a, Vec b) { return _mm256_and_si256(a, b); }
  static Vec bit_or(Vec a, Vec b) { return _mm256_or_si256(a, b); }
  template <int kCount>
  static Vec shift_left(Vec a) {
    return _mm256_slli_epi16(a, kCount);
  }

  static Vec add_sat(Vec a, Vec b) { return _mm256_adds_epu16(a, b); }
  static Vec min(Vec a, Vec b) { return _mm256_min_epu16(a, b); }
  static uint16_t reduce_min(Vec a) {
    const __m128i half = _mm_min_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    return static_cast<uint16_t>(_mm_extract_epi16(_mm_minpos_epu16(half), 0));
  }
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm256_blendv_epi8(x, y, _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a));
  }
  static void store_less(uint8_t* p, Vec a, Vec b) {
    const __m256i not_less = _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(not_less), _mm256_extracti128_si256(not_less, 1));
    const auto mask = static_cast<uint16_t>(~_mm_movemask_epi8(bytes));
    std::memcpy(p, &mask, sizeof mask);
  }

  static Vec sub_sat(Vec a, Vec b) { return _mm256_subs_epi16(a, b); }
  static Vec abs(Vec a) { return _mm256_abs_epi16(a); }
  static Vec mul_round_high(Vec a, Vec b) { return _mm256_mulhrs_epi16(a, b); }
  static Vec mul_low(Vec a, Vec b) { return _mm256_mullo_epi16(a, b); }

  template <int kBits>
  static Vec expand(const uint16_t* p) {
    if constexpr (kBits == 1) {
      const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm256_shuffle_epi8(
          both, _mm256_setr_epi8(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12, 13,
                                 12, 13, 14, 15, 14, 15));
    } else if constexpr (kBits == 2) {
      return _mm256_shuffle_epi8(
          _mm256_set1_epi64x(read<int64_t>(p)),
          _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6,
                           7));
    } else if constexpr (kBits == 3) {
      return _mm256_shuffle_epi8(_mm256_set1_epi32(read<int32_t>(p)),
                                 _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2,
                                                  3, 2, 3, 2, 3, 2, 3, 2, 3));
    } else {
      return _mm256_set1_epi16(read<int16_t>(p));
    }
  }
  template <int kBits>
  static Vec follow(const int16_t* table, const uint16_t* window) {
    const auto from = [=](int i) { return table + (window[i] << kBits & 65535); };
    if constexpr (kBits == 1) {
      return _mm256_setr_epi32(read<int32_t>(from(0)), read<int32_t>(from(1)), read<int32_t>(from(2)),
                               read<int32_t>(from(3)), read<int32_t>(from(4)), read<int32_t>(from(5)),
                               read<int32_t>(from(6)), read<int32_t>(from(7)));
    } else if constexpr (kBits == 2) {
      return _mm256_setr_epi64x(read<int64_t>(from(0)), read<int64_t>(from(1)), read<int64_t>(from(2)),
                                read<int64_t>(from(3)));
    } else if constexpr (kBits == 3) {
      return _mm256_setr_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from(0))),
                               _mm_loadu_si128(reinterpret_cast<const __m128i*>(from(1))));
    } else {
      return load(from(0));
    }
  }

 private:
  template <class T>
  static T read(const void* p) {
    T out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
};

}  // namespace
}  // namespace hyper
