// Conversions between float and the 16-bit formats, in integer arithmetic that compilers vectorise; nearest, ties to
// even. Internal linkage, compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "hyper.h"

namespace hyper {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline float from_float16(uint16_t x) {
  const uint32_t size = x & 0x7fffu;
  // Subnormal numbers as integers: as floats they would be lost where the processor flushes subnormals to zero.
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f);
  const uint32_t normal = (size << 13) + (size < 0x7c00u ? 112u << 23 : 224u << 23);
  return float_of((size < 0x400u ? subnormal : normal) | (x & 0x8000u) << 16);
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  const uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
  // Adding 2^-1 to a number below 2^-14 leaves its multiple of 2^-24 in the low bits.
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
  uint32_t half = size < 0x38800000u ? subnormal : normal;
  half = size >= 0x477ff000u ? 0x7c00u : half;
  half = size > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// from [count] of a HYPER_* dtype, times factors [count] -> to [count]
inline void load_scaled(const void* from, int dtype, int64_t count, const float* factors, float* to) {
  const float* full = static_cast<const float*>(from);
  const uint16_t* half = static_cast<const uint16_t*>(from);
  if (dtype == HYPER_FLOAT32) {
    for (int64_t i = 0; i < count; ++i) to[i] = full[i] * factors[i];
  } else if (dtype == HYPER_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(half[i]) * factors[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from_float16(half[i]) * factors[i];
  }
}

// from[first...] of a HYPER_* dtype -> to [count]
inline void load_as_float(const void* from, int dtype, int64_t first, int64_t count, float* to) {
  const float* full = static_cast<const float*>(from) + first;
  const uint16_t* half = static_cast<const uint16_t*>(from) + first;
  if (dtype == HYPER_FLOAT32) {
    for (int64_t i = 0; i < count; ++i) to[i] = full[i];
  } else if (dtype == HYPER_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(half[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from_float16(half[i]);
  }
}

inline void store_as(const float* from, int64_t count, int dtype, void* to, int64_t offset) {
  float* full = static_cast<float*>(to) + offset;
  uint16_t* half = static_cast<uint16_t*>(to) + offset;
  if (dtype == HYPER_FLOAT32) {
    for (int64_t i = 0; i < count; ++i) full[i] = from[i];
  } else if (dtype == HYPER_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) half[i] = to_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) half[i] = to_float16(from[i]);
  }
}

}  // namespace
}  // namespace hyper
