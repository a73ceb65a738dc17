// Bodies of the product kernels, written once over a class of 32-bit lanes (meaning: simd/words_portable.h) and
// compiled once per instruction set, with internal linkage.
//
// Two rows of a tile are 32 weights, k whole words of its bit string: every shift count and word index of the 32
// windows is a compile-time constant, and the loop over the 8 pairs of rows stays rolled.
#pragma once

#include <cstring>
#include <utility>

#include "shift_matmul_steps.h"

#define HYPER_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define HYPER_UNROLL _Pragma("unroll")
#else
#define HYPER_UNROLL _Pragma("GCC unroll 16")
#endif

namespace hyper {
namespace {

constexpr int kPrefetchBytes = 8192;

// Words of a pair of rows, one tile per lane, preceded by the word before them.
template <class W, int K>
struct PairOfRows {
  typename W::Vec word[K + 1];
  typename W::Vec high[K + 1];

  HYPER_INLINE explicit PairOfRows(const uint32_t* words) {
    HYPER_UNROLL
    for (int i = 0; i <= K; ++i) word[i] = W::load(words + i * W::kLanes);
    HYPER_UNROLL
    for (int i = 1; i <= K; ++i) high[i] = W::high(word[i]);
  }

  // Product of the state of weight I (0..31) with the multiplier.
  template <int I>
  HYPER_INLINE typename W::Vec hash(typename W::Vec multiplier) const {
    constexpr int kLast = (I + 1) * K - 1;  // last bit of the window, counted from the pair's first
    constexpr int kWord = kLast / 32 + 1;
    return W::multiply(W::template window<31 - kLast % 32>(word[kWord - 1], word[kWord], high[kWord]), multiplier);
  }
};

// Asks for the codes that a later group needs, the share of one of the 8 pairs of rows. The transposition jumps between
// tiles, which hardware prefetchers do not follow: without this one core reads 4.5 GB/s on Zen 4.
template <class W, int K>
HYPER_INLINE void prefetch_codes(const uint32_t* group, int pair) {
  constexpr int kGroup = 8 * K * W::kLanes * 4;  // bytes
  constexpr int kAhead = (kPrefetchBytes + kGroup - 1) / kGroup * kGroup;
  const char* from = reinterpret_cast<const char*>(group) + kAhead + pair * (kGroup / 8);
  for (int i = 0; i < kGroup / 8; i += 64) __builtin_prefetch(from + i, 0, 3);
}

// Transposes a group: words [8K + 1, lanes], the last word of each string repeated in front.
template <class W, int K>
HYPER_INLINE void transpose_group(const uint32_t* codes, uint32_t* words) {
  for (int i = 0; i < 8 * K; i += 4) {
    typename W::Vec four[4];
    W::gather4(codes + i, 8 * K, four);
    for (int j = 0; j < 4; ++j) W::store(words + (1 + i + j) * W::kLanes, four[j]);
    if (i == 8 * K - 4) W::store(words, four[3]);
  }
}

template <class W, int T>
struct ExactRow {
  static constexpr int kChains = T >= 4 ? 1 : 2;  // enough independent sums to hide the latency of fma
  typename W::Float total[T][kChains];

  HYPER_INLINE ExactRow(const uint32_t*, const float* sums) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      total[m][0] = W::load(sums + m * W::kLanes);
      if constexpr (kChains == 2) total[m][1] = W::zero();
    }
  }
  template <int C>
  HYPER_INLINE void add(typename W::Vec hash, const uint32_t* values) {
    const typename W::Float weight = W::to_float(W::centred_sum(hash));
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      const float* x = reinterpret_cast<const float*>(values) + (m * kTile + C) * W::kLanes;
      total[m][C % kChains] = W::fma(weight, W::load(x), total[m][C % kChains]);
    }
  }
  HYPER_INLINE void finish(const uint32_t*, float* sums) const {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      typename W::Float all = total[m][0];
      if constexpr (kChains == 2) all = W::add(all, total[m][1]);
      W::store(sums + m * W::kLanes, all);
    }
  }
};

template <class W, int T>
struct Int8Row {
  typename W::Vec total[T];

  HYPER_INLINE Int8Row(const uint32_t* values, const float*) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) total[m] = W::load(values + (T * (kTile + 1) + m) * W::kLanes);
  }
  template <int C>
  HYPER_INLINE void add(typename W::Vec hash, const uint32_t* values) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      total[m] = W::dot(total[m], hash, W::load(values + (m * kTile + C) * W::kLanes));
    }
  }
  HYPER_INLINE void finish(const uint32_t* values, float* sums) const {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      const float* scale = reinterpret_cast<const float*>(values) + (T * kTile + m) * W::kLanes;
      const auto sum = W::load(sums + m * W::kLanes);
      W::store(sums + m * W::kLanes, W::fma(W::to_float(total[m]), W::load(scale), sum));
    }
  }
};

template <class W, int K, int T, template <class, int> class Row, int kFirst, int... C>
HYPER_INLINE void multiply_row(const PairOfRows<W, K>& pair, typename W::Vec multiplier, const uint32_t* values,
                               float* sums, std::integer_sequence<int, C...>) {
  Row<W, T> row(values, sums);
  (row.template add<C>(pair.template hash<kFirst + C>(multiplier), values), ...);
  row.finish(values, sums);
}

template <class W, int K, int T, template <class, int> class Row, bool kInt8>
void multiply(const uint32_t* codes, int64_t groups, const uint32_t* activations, uint32_t multiplier, float* sums) {
  using Columns = std::make_integer_sequence<int, kTile>;
  constexpr int kStep = T * W::kLanes;
  const typename W::Vec factor = W::set1(multiplier);
  alignas(64) uint32_t words[(8 * K + 1) * W::kLanes];
  for (int64_t g = 0; g < groups; ++g) {
    transpose_group<W, K>(codes + g * 8 * K * W::kLanes, words);
    const uint32_t* values = activations + g * activation_rows(kInt8) * kStep;
    for (int p = 0; p < 8; ++p) {
      prefetch_codes<W, K>(codes + g * 8 * K * W::kLanes, p);
      const PairOfRows<W, K> pair(words + p * K * W::kLanes);
      multiply_row<W, K, T, Row, 0>(pair, factor, values, sums + 2 * p * kStep, Columns());
      multiply_row<W, K, T, Row, kTile>(pair, factor, values, sums + (2 * p + 1) * kStep, Columns());
    }
  }
}

template <class W, int K, bool kBfloat16, int kFirst, int... C>
HYPER_INLINE void decode_row(const PairOfRows<W, K>& pair, typename W::Vec multiplier, void* row,
                             std::integer_sequence<int, C...>) {
  typename W::Float weight[kTile] = {
      W::to_float(W::centred_sum(pair.template hash<kFirst + C>(multiplier)))...};
  typename W::Vec out[kTile];
  constexpr int kWords = kBfloat16 ? kTile / 2 : kTile;  // words that a tile's row takes
  HYPER_UNROLL
  for (int c = 0; c < kWords; ++c) {
    if constexpr (kBfloat16) {
      out[c] = W::pack_bfloat16(weight[2 * c], weight[2 * c + 1]);
    } else {
      out[c] = W::bits(weight[c]);
    }
  }
  HYPER_UNROLL
  for (int c = 0; c < kWords; c += 4) W::scatter4(out + c, static_cast<uint32_t*>(row) + c, kWords);
}

template <class W, int K, bool kBfloat16>
void decode(const uint32_t* codes, int64_t groups, uint32_t multiplier, void* rows, int64_t stride) {
  using Columns = std::make_integer_sequence<int, kTile>;
  constexpr int kBytes = kBfloat16 ? 2 : 4;
  const typename W::Vec factor = W::set1(multiplier);
  alignas(64) uint32_t words[(8 * K + 1) * W::kLanes];
  for (int64_t g = 0; g < groups; ++g) {
    transpose_group<W, K>(codes + g * 8 * K * W::kLanes, words);
    for (int p = 0; p < 8; ++p) {
      prefetch_codes<W, K>(codes + g * 8 * K * W::kLanes, p);
      const PairOfRows<W, K> pair(words + p * K * W::kLanes);
      char* row = static_cast<char*>(rows) + (2 * p * stride + g * W::kLanes * kTile) * kBytes;
      decode_row<W, K, kBfloat16, 0>(pair, factor, row, Columns());
      decode_row<W, K, kBfloat16, kTile>(pair, factor, row + stride * kBytes, Columns());
    }
  }
}

// Symmetric quantization to -127..127 of the 16 columns of each lane.
template <class W>
void quantize_group(const float* columns, uint32_t* values, float* scale, uint32_t* offset) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  for (int i = 0; i < W::kLanes; ++i) {
    float largest = 0.0f;
    for (int c = 0; c < kTile; ++c) {
      const float size = columns[c * W::kLanes + i] < 0 ? -columns[c * W::kLanes + i] : columns[c * W::kLanes + i];
      largest = size > largest ? size : largest;
    }
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    uint32_t total = 0;
    for (int c = 0; c < kTile; ++c) {
      const float shifted = columns[c * W::kLanes + i] * inverse + kRound;
      int32_t q;
      std::memcpy(&q, &shifted, sizeof q);
      q -= 0x4B400000;
      total += static_cast<uint32_t>(q);
      values[c * W::kLanes + i] = W::activation(q);
    }
    scale[i] = largest / 127.0f;
    offset[i] = 0u - static_cast<uint32_t>(kByteCentre) * total;
  }
}

template <class W>
void arrange(const float* values, int64_t groups, bool int8, int token, int tokens, uint32_t* activations) {
  constexpr int kBlock = kTile * W::kLanes;
  for (int64_t g = 0; g < groups; ++g) {
    alignas(64) uint32_t columns[kBlock];
    const uint32_t* from = reinterpret_cast<const uint32_t*>(values) + g * kBlock;
    for (int c = 0; c < kTile; c += 4) {
      typename W::Vec four[4];
      W::gather4(from + c, kTile, four);
      for (int j = 0; j < 4; ++j) W::store(columns + (c + j) * W::kLanes, four[j]);
    }
    uint32_t* group = activations + g * activation_rows(int8) * tokens * W::kLanes;
    if (int8) {
      float unpacked[kBlock];
      std::memcpy(unpacked, columns, sizeof unpacked);
      uint32_t* scales = group + (tokens * kTile + token) * W::kLanes;
      quantize_group<W>(unpacked, group + token * kBlock, reinterpret_cast<float*>(scales),
                        scales + tokens * W::kLanes);
    } else {
      std::memcpy(group + token * kBlock, columns, sizeof columns);
    }
  }
}

template <class W>
void reduce(const float* sums, int rows, int segments, int width, float* totals) {
  for (int r = 0; r < rows; ++r, sums += W::kLanes) {
    if (width == W::kLanes) {
      totals[r] = W::sum(W::load(sums));
      continue;
    }
    for (int s = 0; s < segments; ++s) {
      float total = 0.0f;
      for (int i = 0; i < width; ++i) total += sums[s * width + i];
      totals[r * segments + s] = total;
    }
  }
}

template <class W, int K>
constexpr void fill_rate(MatmulSteps& steps) {
  const MultiplyStep exact[4] = {multiply<W, K, 1, ExactRow, false>, multiply<W, K, 2, ExactRow, false>,
                                 multiply<W, K, 4, ExactRow, false>, multiply<W, K, 8, ExactRow, false>};
  const MultiplyStep int8[4] = {multiply<W, K, 1, Int8Row, true>, multiply<W, K, 2, Int8Row, true>,
                                multiply<W, K, 4, Int8Row, true>, multiply<W, K, 8, Int8Row, true>};
  for (int form = 0; form < 4; ++form) {
    steps.exact[K - 1][form] = exact[form];
    steps.int8[K - 1][form] = int8[form];
  }
  steps.decode_float[K - 1] = decode<W, K, false>;
  steps.decode_bfloat16[K - 1] = decode<W, K, true>;
}

template <class W, int... K>
constexpr MatmulSteps matmul_table(const char* name, std::integer_sequence<int, K...>) {
  MatmulSteps steps{};
  steps.name = name;
  steps.lanes = W::kLanes;
  (fill_rate<W, K + 1>(steps), ...);
  steps.arrange = arrange<W>;
  steps.reduce = reduce<W>;
  steps.rotate_input = rotate_input;
  steps.rotate_output = rotate_output;
  steps.scale_product = scale_product;
  steps.to_bfloat16 = to_bfloat16;
  return steps;
}

template <class W>
constexpr MatmulSteps matmul_table(const char* name) {
  return matmul_table<W>(name, std::make_integer_sequence<int, 8>());
}

}  // namespace
}  // namespace hyper
