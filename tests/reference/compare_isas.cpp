// Compares an instruction set of the core with "scalar" through the C interface, for processors that an emulator stands
// in for:
//
//     compare_isas neon
//
// Codes and decoded weights must be the same bits; products and weights rotated back may differ by the order of their
// sums. Prints what differs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "hyper.h"

namespace {

using Floats = std::vector<float>;
using Words = std::vector<uint32_t>;

std::mt19937 generator(0);
const char* isa;
int failures = 0;

Floats gaussian(size_t count) {
  std::normal_distribution<float> distribution;
  Floats values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

Words bits(size_t count) {
  Words words(count);
  for (uint32_t& word : words) word = generator();
  return words;
}

// Of a finite float16.
float value(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return half >> 15 ? -size : size;
}

void require(int result, const char* what) {
  if (result == HYPER_OK) return;
  std::printf("%s: error %d\n", what, result);
  std::exit(2);
}

// Calls run(result) under both sets; results may differ by `tolerance` of their norm.
template <class Result, class Run>
void compare(const char* what, int parameter, size_t count, double tolerance, Run run) {
  Result wanted(count), got(count);
  require(hyper_set_isa("scalar"), "scalar");
  require(run(wanted.data()), what);
  require(hyper_set_isa(isa), isa);
  require(run(got.data()), what);
  double difference = 0, norm = 0;
  for (size_t i = 0; i < count; ++i) {
    const double a = static_cast<double>(got[i]), b = static_cast<double>(wanted[i]);
    difference += (a - b) * (a - b);
    norm += b * b;
  }
  if (std::sqrt(difference) <= tolerance * std::sqrt(norm) && norm > 0) return;
  std::printf("%s %d: relative difference %g, norm %g\n", what, parameter, std::sqrt(difference / norm), std::sqrt(norm));
  ++failures;
}

void compare_shift_coding(int rate, int effort) {
  const uint32_t multiplier = 0x64B5D79F;
  const Floats tiles = gaussian(256);
  compare<Words>("shift_encode", 100 * rate + effort, 8 * rate, 0, [&](uint32_t* codes) {
    return hyper_shift_encode(tiles.data(), 1, rate, effort, multiplier, 1, codes);
  });
  const Words codes = bits(3 * 8 * rate);
  compare<Floats>("shift_decode", rate, 3 * 256, 0, [&](float* weights) {
    return hyper_shift_decode(codes.data(), 3, rate, multiplier, 1, weights);
  });
}

// Columns are `factor` times a power of two.
void compare_shift_products(int rate, int64_t columns, int factor) {
  const int64_t rows = 48;
  const Floats cosines = gaussian(factor * factor);
  Floats scales_in(columns, 0.25f), signs_out(rows, -1.0f);
  for (int64_t i = 0; i < columns; i += 3) scales_in[i] = -0.25f;
  std::vector<uint16_t> signs_in(columns, 0x3E80);
  for (int64_t i = 0; i < columns; i += 3) signs_in[i] = 0xBE80;
  const Floats sum_weights = gaussian(factor);
  hyper_shift_plan plan{rows, columns, rate, 0x64B5D79F, -0.005f, 1 / 147.8f, 1, 16, 1, {factor}, cosines.data(),
                        scales_in.data(), signs_in.data(), signs_out.data(), sum_weights.data()};
  const Words codes = bits(rows / 16 * (columns / 16) * 8 * rate);
  const std::vector<uint16_t> scale(rows, 0x3C00), out_scale(rows, 0x3F80);  // ones
  for (int64_t tokens : {1, 3, 8}) {
    const Floats x = gaussian(tokens * columns);
    std::vector<uint16_t> narrow(tokens * columns);
    for (uint16_t& half : narrow) half = (generator() & 0x8FFF) | 0x3000;  // 1/8 to 2, of both signs
    // A product that rounding to 16 bits moves may be rounded to the next float16, as a few of a hundred are.
    compare<Floats>("shift_matmul float16", rate, tokens * rows, 4e-4, [&](float* y) {
      std::vector<uint16_t> product(tokens * rows);
      const int result = hyper_shift_matmul(&plan, codes.data(), scale.data(), out_scale.data(), narrow.data(),
                                            HYPER_FLOAT16, tokens, 0, 1, product.data());
      for (size_t i = 0; i < product.size(); ++i) y[i] = value(product[i]);
      return result;
    });
    for (int int8 = 0; int8 <= (tokens == 1); ++int8) {
      // A sum that lies between two integers may be rounded to either.
      compare<Floats>(int8 ? "shift_matmul int8" : "shift_matmul", rate, tokens * rows, int8 ? 1e-3 : 1e-5, [&](float* y) {
        return hyper_shift_matmul(&plan, codes.data(), scale.data(), out_scale.data(), x.data(), HYPER_FLOAT32, tokens,
                                  int8, 1, y);
      });
    }
  }
  compare<Floats>("shift_decode_rows", rate, rows * columns, 0, [&](float* weights) {
    return hyper_shift_decode_rows(&plan, codes.data(), 0, rows / 16, 1, weights, HYPER_FLOAT32);
  });
  compare<Floats>("shift_decode_weight", rate, rows * columns, 1e-6, [&](float* weights) {
    return hyper_shift_decode_weight(&plan, codes.data(), scale.data(), out_scale.data(), 1, weights, HYPER_FLOAT32);
  });
}

void compare_winding(int width, int points, int shells) {
  const int64_t rows = 7, columns = 333;
  const hyper_winding_plan plan{rows, columns, width, points, shells, {2684354, 107374183}};
  const Words codes = bits(rows * (((columns + 1) / 2 * width + 31) / 32));
  const Floats centre = gaussian(2);
  Floats sides(shells + 1);
  for (int s = 0; s <= shells; ++s) sides[s] = 0.5f + static_cast<float>(s);
  compare<Floats>("winding_decode", width, rows * columns, 0, [&](float* weights) {
    return hyper_winding_decode(&plan, codes.data(), centre.data(), sides.data(), 0, rows, 1, weights, HYPER_FLOAT32);
  });
  for (int64_t tokens : {1, 2, 3, 8}) {
    const Floats x = gaussian(tokens * columns);
    compare<Floats>("winding_matmul", width, tokens * rows, 1e-5, [&](float* y) {
      return hyper_winding_matmul(&plan, codes.data(), centre.data(), sides.data(), x.data(), HYPER_FLOAT32, tokens, 1, y);
    });
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2 || !hyper_has_isa(arguments[1])) {
    std::printf("usage: compare_isas ISA, one that this machine has\n");
    return 2;
  }
  isa = arguments[1];
  for (int rate = 1; rate <= 8; ++rate) {
    compare_shift_coding(rate, 10);
    compare_shift_products(rate, 16 * 17, 17);
    compare_shift_products(rate, 512 * 9, 9);
  }
  compare_shift_coding(3, 16);
  compare_shift_coding(8, 16);
  compare_winding(13, 1600, 3);
  compare_winding(5, 6, 3);
  compare_winding(8, 6, 19);
  const Floats plane = gaussian(2 * 500), nodes = gaussian(2 * 300);
  compare<std::vector<int32_t>>("winding_nearest", 300, 500, 0, [&](int32_t* index) {
    return hyper_winding_nearest(plane.data(), 500, nodes.data(), 300, 1, index);
  });
  std::printf("%d differences\n", failures);
  return failures != 0;
}
