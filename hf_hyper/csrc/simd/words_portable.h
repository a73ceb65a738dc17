// Vector class of four 32-bit lanes without intrinsics, on compiler vectors: the meaning of every operation that the
// product kernels use, and the fallback for any machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace hyper {
namespace {

struct WordsPortable {
  static constexpr int kLanes = 4;
  typedef uint32_t Vec __attribute__((vector_size(16)));
  typedef int32_t Signed __attribute__((vector_size(16)));
  typedef float Float __attribute__((vector_size(16)));

  static Vec load(const uint32_t* p) { return load_as<Vec>(p); }
  static void store(uint32_t* p, Vec a) { std::memcpy(p, &a, sizeof a); }
  static Float load(const float* p) { return load_as<Float>(p); }
  static void store(float* p, Float a) { std::memcpy(p, &a, sizeof a); }
  static Vec set1(uint32_t x) { return Vec{x, x, x, x}; }
  static Float zero() { return Float{}; }
  // The float whose bits are *p, in all lanes.
  static Float spread(const uint32_t* p) { return reinterpret_cast<Float>(set1(*p)); }

  // out[w] lane i = p[i * kCount + w]
  template <int kCount>
  static void deinterleave(const uint32_t* p, Vec out[kCount]) {
    for (int w = 0; w < kCount; ++w) out[w] = Vec{p[w], p[kCount + w], p[2 * kCount + w], p[3 * kCount + w]};
  }
  // Every lane gets the one before it. Lanes go round in rings of kRing, the vector or several vectors; in the second case
  // `before` goes to the first lane.
  template <int>
  static Vec previous(Vec last, uint32_t before) {
    return Vec{before, last[0], last[1], last[2]};
  }
  // adjacent_halves<K>(tile, out), for K up to this, needs 16 lanes. The 8 K words of a tile are a ring of 16 K halves, the
  // upper one of a word first: lane r of out[i] holds halves K r + i - 1 and K r + i, the latter below.
  static constexpr int kHalvesUpTo = 0;
  // p[i * stride + w] = in[w] lane i: four words of kLanes records.
  static void scatter4(const Vec in[4], uint32_t* p, int64_t stride) {
    for (int i = 0; i < kLanes; ++i) store(p + i * stride, Vec{in[0][i], in[1][i], in[2][i], in[3][i]});
  }

  // Upper half of every word.
  static Vec high(Vec word) { return word >> 16; }
  // The 16 bits that end kShift (0..15) bits above the end of every word. kBits is the rate: windows are kBits apart.
  template <int kShift, int>
  static Vec within(Vec word) {
    return low_half(word >> kShift);
  }
  // The 16 bits that end kShift (1..15) bits above the end of `high`, the upper half of a word; `before` is the word before
  // it.
  template <int kShift, int>
  static Vec across(Vec before, Vec high) {
    return low_half((before << 16 | high) >> kShift);
  }
  static Vec multiply(Vec a, Vec b) { return a * b; }

  // Sum of the four bytes, less 510.
  static Vec centred_sum(Vec hash) { return byte_sum(hash) - 510u; }
  static Vec add(Vec a, Vec b) { return a + b; }
  // Signed integers.
  static Float to_float(Vec a) { return __builtin_convertvector(reinterpret_cast<Signed>(a), Float); }
  // a * b + c, rounded once or twice.
  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Float add(Float a, Float b) { return a + b; }

  // The form in which `dot` wants an activation of -127..127.
  static uint32_t activation(int32_t q) { return static_cast<uint32_t>(q); }
  // acc + byte sum (not centred) * activation, as signed integers.
  static Vec dot(Vec acc, Vec hash, Vec activation) { return acc + byte_sum(hash) * activation; }

  // Whether there are dot products of pairs of 16-bit numbers, as two more operations:
  //   byte_sums(a, b)           byte sums of both, not centred, as the halves of `dot_pair` go
  //   dot_pair(acc, sums, *ab)  acc + first sums * lower half of *ab + second sums * upper half, as signed integers
  static constexpr bool kPairs = false;

  // Nearest bfloat16 of both, ties to even: `even` in the lower half of the lane, `odd` in the upper.
  static Vec pack_bfloat16(Float even, Float odd) { return rounded(even) >> 16 | (rounded(odd) & 0xffff0000u); }
  // The same bits.
  static Vec bits(Float a) { return reinterpret_cast<Vec>(a); }

 private:
  static Vec low_half(Vec a) { return a & 65535u; }
  template <class V>
  static V load_as(const void* p) {
    V out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
  static Vec byte_sum(Vec x) {
    const Vec pairs = (x & 0x00ff00ffu) + (x >> 8 & 0x00ff00ffu);
    return (pairs & 65535u) + (pairs >> 16);
  }
  static Vec rounded(Float a) { return bits(a) + 0x7fffu + (bits(a) >> 16 & 1u); }
};

}  // namespace
}  // namespace hyper
