// Vector class without intrinsics: the meaning of every operation the kernels use, and the fallback for any machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace hyper {
namespace {

struct Portable {
  static constexpr int kLanes = 8;
  struct Vec {
    uint16_t lane[kLanes];
  };

  template <class Operation>
  static Vec map(Vec a, Vec b, Operation operation) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = static_cast<uint16_t>(operation(a.lane[i], b.lane[i]));
    return out;
  }
  static int as_signed(uint16_t x) { return static_cast<int16_t>(x); }

  static Vec load(const void* p) {
    Vec out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
  static void store(void* p, Vec a) { std::memcpy(p, &a, sizeof a); }
  static Vec set1(int16_t x) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = static_cast<uint16_t>(x);
    return out;
  }
  static Vec iota() { return {{0, 1, 2, 3, 4, 5, 6, 7}}; }

  static Vec add(Vec a, Vec b) {
    return map(a, b, [](int x, int y) { return x + y; });
  }
  static Vec sub(Vec a, Vec b) {
    return map(a, b, [](int x, int y) { return x - y; });
  }
  static Vec bit_and(Vec a, Vec b) {
    return map(a, b, [](int x, int y) { return x & y; });
  }
  static Vec bit_or(Vec a, Vec b) {
    return map(a, b, [](int x, int y) { return x | y; });
  }
  template <int kCount>
  static Vec shift_left(Vec a) {
    return map(a, a, [](int x, int) { return x << kCount; });
  }

  // Unsigned: saturating sum, minimum.
  static Vec add_sat(Vec a, Vec b) {
    return map(a, b, [](int x, int y) { return x + y < 65535 ? x + y : 65535; });
  }
  static Vec min(Vec a, Vec b) {
    return map(a, b, [](int x, int y) { return x < y ? x : y; });
  }
  static uint16_t reduce_min(Vec a) {
    uint16_t low = a.lane[0];
    for (int i = 1; i < kLanes; ++i) low = a.lane[i] < low ? a.lane[i] : low;
    return low;
  }
  // a < b ? x : y, unsigned comparison.
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i];
    return out;
  }
  // Bit i of the kLanes / 8 bytes at p: a < b in lane i.
  static void store_less(uint8_t* p, Vec a, Vec b) {
    int mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= (a.lane[i] < b.lane[i]) << i;
    *p = static_cast<uint8_t>(mask);
  }

  // Signed: saturating difference, magnitude, (a * b + 2^14) >> 15, low half of the product.
  static Vec sub_sat(Vec a, Vec b) {
    return map(a, b, [](uint16_t x, uint16_t y) {
      const int d = as_signed(x) - as_signed(y);
      return d > 32767 ? 32767 : d < -32768 ? -32768 : d;
    });
  }
  static Vec abs(Vec a) {
    return map(a, a, [](uint16_t x, uint16_t) { return as_signed(x) < 0 ? -as_signed(x) : as_signed(x); });
  }
  static Vec mul_round_high(Vec a, Vec b) {
    return map(a, b, [](uint16_t x, uint16_t y) { return (as_signed(x) * as_signed(y) + (1 << 14)) >> 15; });
  }
  static Vec mul_low(Vec a, Vec b) {
    return map(a, b, [](uint32_t x, uint32_t y) { return x * y; });
  }

  // Lane j = p[j >> kBits]: a predecessor's entry for each of its 2^kBits successors.
  template <int kBits>
  static Vec expand(const uint16_t* p) {
    Vec out;
    for (int j = 0; j < kLanes; ++j) out.lane[j] = p[j >> kBits];
    return out;
  }
  // Lane j = the table entry reached from window[j >> kBits] by the symbol of lane j; `table` is already offset by the
  // first lane's symbol.
  template <int kBits>
  static Vec follow(const int16_t* table, const uint16_t* window) {
    Vec out;
    for (int j = 0; j < kLanes; ++j) {
      const int base = window[j >> kBits] << kBits & 65535;
      out.lane[j] = static_cast<uint16_t>(table[base + (j & ((1 << kBits) - 1))]);
    }
    return out;
  }
};

}  // namespace
}  // namespace hyper
