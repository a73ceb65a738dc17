// Vector class of 4 lanes of 32 bits: NEON. Meaning of the operations: simd/words_portable.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace hyper {
namespace {

struct WordsNeon {
  static constexpr int kLanes = 4;
  using Vec = uint32x4_t;
  using Float = float32x4_t;

  static Vec load(const uint32_t* p) { return vld1q_u32(p); }
  static void store(uint32_t* p, Vec a) { vst1q_u32(p, a); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Float a) { vst1q_f32(p, a); }
  static Vec set1(uint32_t x) { return vdupq_n_u32(x); }
  static Float zero() { return vdupq_n_f32(0.0f); }
  static Float spread(const uint32_t* p) { return vreinterpretq_f32_u32(vld1q_dup_u32(p)); }

  template <int kCount>
  static void deinterleave(const uint32_t* p, Vec out[kCount]) {
    if constexpr (kCount == 1) {
      out[0] = load(p);
    } else if constexpr (kCount == 2) {
      const uint32x4x2_t in = vld2q_u32(p);
      for (int i = 0; i < kCount; ++i) out[i] = in.val[i];
    } else if constexpr (kCount == 3) {
      const uint32x4x3_t in = vld3q_u32(p);
      for (int i = 0; i < kCount; ++i) out[i] = in.val[i];
    } else if constexpr (kCount == 4) {
      const uint32x4x4_t in = vld4q_u32(p);
      for (int i = 0; i < kCount; ++i) out[i] = in.val[i];
    } else {
      for (int i = 0; i < kCount; ++i) out[i] = Vec{p[i], p[kCount + i], p[2 * kCount + i], p[3 * kCount + i]};
    }
  }
  template <int>
  static Vec previous(Vec last, uint32_t before) {
    return vextq_u32(set1(before), last, 3);
  }
  static constexpr int kHalvesUpTo = 0;
  static void scatter4(const Vec in[4], uint32_t* p, int64_t stride) {
    Vec quad[4];
    transpose4(in, quad);
    for (int q = 0; q < 4; ++q) store(p + q * stride, quad[q]);
  }

  static Vec high(Vec word) { return vshrq_n_u32(word, 16); }
  template <int kShift, int>
  static Vec within(Vec word) {
    if constexpr (kShift == 0) return low_half(word);
    return low_half(vshrq_n_u32(word, kShift == 0 ? 1 : kShift));
  }
  template <int kShift, int>
  static Vec across(Vec before, Vec high) {
    return low_half(vshrq_n_u32(vsliq_n_u32(high, before, 16), kShift));
  }
  static Vec multiply(Vec a, Vec b) { return vmulq_u32(a, b); }

  static Vec centred_sum(Vec hash) { return vsubq_u32(byte_sum(hash), set1(510)); }
  static Vec add(Vec a, Vec b) { return vaddq_u32(a, b); }
  static Float to_float(Vec a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }

  static uint32_t activation(int32_t q) { return static_cast<uint32_t>(q); }
  static Vec dot(Vec acc, Vec hash, Vec activation) { return vmlaq_u32(acc, byte_sum(hash), activation); }

  static constexpr bool kPairs = true;
  static Vec byte_sums(Vec a, Vec b) {  // the first sums of all lanes, then the second ones
    return vreinterpretq_u32_u16(vpaddq_u16(pair_sums(a), pair_sums(b)));
  }
  static Vec dot_pair(Vec acc, Vec sums, const uint32_t* activations) {
    const int16x4_t by = vreinterpret_s16_u32(vdup_n_u32(*activations));
    const int16x8_t all = vreinterpretq_s16_u32(sums);
    const int32x4_t first = vmlal_lane_s16(vreinterpretq_s32_u32(acc), vget_low_s16(all), by, 0);
    return vreinterpretq_u32_s32(vmlal_high_lane_s16(first, all, by, 1));
  }

  static Vec pack_bfloat16(Float even, Float odd) { return vsriq_n_u32(rounded(odd), rounded(even), 16); }
  static Vec bits(Float a) { return vreinterpretq_u32_f32(a); }

 private:
  static Vec low_half(Vec a) { return vandq_u32(a, set1(65535)); }
  static uint16x8_t pair_sums(Vec hash) { return vpaddlq_u8(vreinterpretq_u8_u32(hash)); }
  static Vec byte_sum(Vec hash) { return vpaddlq_u16(pair_sums(hash)); }
  static void transpose4(const Vec in[4], Vec out[4]) {
    const auto wide = [](Vec a) { return vreinterpretq_u64_u32(a); };
    const auto words = [](uint64x2_t a) { return vreinterpretq_u32_u64(a); };
    const Vec a = vzip1q_u32(in[0], in[1]), b = vzip1q_u32(in[2], in[3]);
    const Vec c = vzip2q_u32(in[0], in[1]), d = vzip2q_u32(in[2], in[3]);
    out[0] = words(vzip1q_u64(wide(a), wide(b)));
    out[1] = words(vzip2q_u64(wide(a), wide(b)));
    out[2] = words(vzip1q_u64(wide(c), wide(d)));
    out[3] = words(vzip2q_u64(wide(c), wide(d)));
  }
  // Nearest bfloat16, ties to even, in the upper halves.
  static Vec rounded(Float a) {
    const Vec v = bits(a);
    return vaddq_u32(vaddq_u32(v, set1(0x7fff)), vandq_u32(vshrq_n_u32(v, 16), set1(1)));
  }
};

}  // namespace
}  // namespace hyper
