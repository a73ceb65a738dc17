// Vector class of 8 lanes: NEON. Meaning of the operations: simd/portable.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace hyper {
namespace {

struct Neon {
  static constexpr int kLanes = 8;
  using Vec = uint16x8_t;

  static Vec load(const void* p) { return vreinterpretq_u16_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static void store(void* p, Vec a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u16(a)); }
  static Vec set1(int16_t x) { return vdupq_n_u16(static_cast<uint16_t>(x)); }
  static Vec iota() {
    static const uint16_t kIota[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    return vld1q_u16(kIota);
  }

  static Vec add(Vec a, Vec b) { return vaddq_u16(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_u16(a, b); }
  static Vec bit_and(Vec a, Vec b) { return vandq_u16(a, b); }
  static Vec bit_or(Vec a, Vec b) { return vorrq_u16(a, b); }
  template <int kCount>
  static Vec shift_left(Vec a) {
    return vshlq_n_u16(a, kCount);
  }

  static Vec add_sat(Vec a, Vec b) { return vqaddq_u16(a, b); }
  static Vec min(Vec a, Vec b) { return vminq_u16(a, b); }
  static uint16_t reduce_min(Vec a) { return vminvq_u16(a); }
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) { return vbslq_u16(vcltq_u16(a, b), x, y); }
  static void store_less(uint8_t* p, Vec a, Vec b) {
    static const uint16_t kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    *p = static_cast<uint8_t>(vaddvq_u16(vandq_u16(vcltq_u16(a, b), vld1q_u16(kBit))));
  }

  static Vec sub_sat(Vec a, Vec b) {
    return vreinterpretq_u16_s16(vqsubq_s16(vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b)));
  }
  static Vec abs(Vec a) { return vreinterpretq_u16_s16(vabsq_s16(vreinterpretq_s16_u16(a))); }
  // vqrdmulh saturates -32768 * -32768 to 32767; the comparison adds the one that the definition wants (32768).
  static Vec mul_round_high(Vec a, Vec b) {
    const int16x8_t product = vqrdmulhq_s16(vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b));
    const uint16x8_t lowest = vdupq_n_u16(0x8000);
    const uint16x8_t both = vandq_u16(vceqq_u16(a, lowest), vceqq_u16(b, lowest));
    return vsubq_u16(vreinterpretq_u16_s16(product), both);
  }
  static Vec mul_low(Vec a, Vec b) { return vmulq_u16(a, b); }

  template <int kBits>
  static Vec expand(const uint16_t* p) {
    if constexpr (kBits == 1) {
      const uint16x4_t four = vld1_u16(p);
      return vcombine_u16(vzip1_u16(four, four), vzip2_u16(four, four));
    } else if constexpr (kBits == 2) {
      return vcombine_u16(vdup_n_u16(p[0]), vdup_n_u16(p[1]));
    } else {
      return vdupq_n_u16(p[0]);
    }
  }
  template <int kBits>
  static Vec follow(const int16_t* table, const uint16_t* window) {
    const auto from = [=](int i) { return table + (window[i] << kBits & 65535); };
    if constexpr (kBits == 1) {
      uint32_t pairs[4];
      for (int i = 0; i < 4; ++i) std::memcpy(pairs + i, from(i), 4);
      return vreinterpretq_u16_u32(vld1q_u32(pairs));
    } else if constexpr (kBits == 2) {
      return vreinterpretq_u16_s16(vcombine_s16(vld1_s16(from(0)), vld1_s16(from(1))));
    } else {
      return vreinterpretq_u16_s16(vld1q_s16(from(0)));
    }
  }
};

}  // namespace
}  // namespace hyper
