// Bodies of the product kernels for few tokens and of the decoder of rows. Compiled once per instruction set, with internal
// linkage.
#pragma once

#include <cstring>

#include "shift_lanes_inl.h"

namespace hyper {
namespace {

// Sums of one row of every lane, for T tokens: of float activations,
template <class W, int T>
struct ExactRow {
  static constexpr int kRecord = record_words(false);
  static constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;  // enough independent sums to hide the latency of fma
  typename W::Float total[T][kChains];

  HYPER_INLINE ExactRow() {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      HYPER_UNROLL
      for (int i = 0; i < kChains; ++i) total[m][i] = W::zero();
    }
  }
  HYPER_INLINE void begin(const uint32_t*) {}
  template <int C>
  HYPER_INLINE void add(typename W::Vec hash, const uint32_t* values) {
    const typename W::Float weight = W::to_float(W::centred_sum(hash));
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      total[m][C % kChains] = W::fma(weight, W::spread(values + m * kRecord + C), total[m][C % kChains]);
    }
  }
  HYPER_INLINE void end(const uint32_t*) {}
  HYPER_INLINE typename W::Float sum(int m) const {
    typename W::Float all = total[m][0];
    HYPER_UNROLL
    for (int i = 1; i < kChains; ++i) all = W::add(all, total[m][i]);
    return all;
  }
};

// and of int8 activations, tile by tile as integers.
template <class W, int T>
struct Int8Row {
  static constexpr int kRecord = record_words(true);
  typename W::Vec dot[T];
  typename W::Float total[T];

  HYPER_INLINE Int8Row() {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) total[m] = W::zero();
  }
  HYPER_INLINE void begin(const uint32_t* values) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) dot[m] = W::set1(values[m * kRecord + kTile + 1]);
  }
  template <int C>
  HYPER_INLINE void add(typename W::Vec hash, const uint32_t* values) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) dot[m] = W::dot(dot[m], hash, W::set1(values[m * kRecord + C]));
  }
  HYPER_INLINE void end(const uint32_t* values) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      total[m] = W::fma(W::to_float(dot[m]), W::spread(values + m * kRecord + kTile), total[m]);
    }
  }
  HYPER_INLINE typename W::Float sum(int m) const { return total[m]; }
};

template <int kFirst, class W, int K, class Row, int... C>
HYPER_INLINE void multiply_row(const LaneWords<W, K>& words, typename W::Vec multiplier, const uint32_t* values, Row& row,
                               std::integer_sequence<int, C...>) {
  row.begin(values);
  (row.template add<C>(W::multiply(words.template state<kFirst + C>(), multiplier), values), ...);
  row.end(values);
}

template <class W, int K, int T, template <class, int> class Row>
void multiply(const uint32_t* codes, int64_t next, int64_t in_tiles, const uint32_t* activations, uint32_t multiplier,
              float* totals) {
  using L = Lanes<W, K>;
  using Columns = std::make_integer_sequence<int, kTile>;
  const typename W::Vec factor = W::set1(multiplier);
  for (int part = 0; part < L::kVectors; ++part) {
    Row<W, T> row[L::kRows];
    const uint32_t *tile = codes, *values = activations;
    for (int64_t t = 0; t < in_tiles; ++t, tile += 8 * K, values += T * Row<W, T>::kRecord) {
      if (part == 0) prefetch_codes<W, K>(tile, next);
      const LaneWords<W, K> words(tile, next, part);
      multiply_row<0>(words, factor, values, row[0], Columns());
      if constexpr (L::kRows == 2) multiply_row<kTile>(words, factor, values, row[1], Columns());
    }
    for (int r = 0; r < L::kRows; ++r) {
      for (int m = 0; m < T; ++m) {
        float lane[W::kLanes];
        W::store(lane, row[r].sum(m));
        float* to = totals + m * kTile * L::kTiles + part * W::kLanes * L::kRows + r;
        for (int i = 0; i < W::kLanes; ++i) to[i * L::kRows] = lane[i];
      }
    }
  }
}

template <int kFirst, class W, int K, bool kBfloat16, int... C>
HYPER_INLINE void decode_row(const LaneWords<W, K>& words, typename W::Vec multiplier, void* row, int64_t stride,
                             std::integer_sequence<int, C...>) {
  typename W::Float weight[kTile] = {
      W::to_float(W::centred_sum(W::multiply(words.template state<kFirst + C>(), multiplier)))...};
  typename W::Vec out[kTile];
  constexpr int kOut = kBfloat16 ? kTile / 2 : kTile;  // words that a tile's row takes
  HYPER_UNROLL
  for (int c = 0; c < kOut; ++c) {
    if constexpr (kBfloat16) {
      out[c] = W::pack_bfloat16(weight[2 * c], weight[2 * c + 1]);
    } else {
      out[c] = W::bits(weight[c]);
    }
  }
  HYPER_UNROLL
  for (int c = 0; c < kOut; c += 4) W::scatter4(out + c, static_cast<uint32_t*>(row) + c, stride);
}

template <class W, int K, bool kBfloat16>
void decode(const uint32_t* codes, int64_t next, int64_t in_tiles, uint32_t multiplier, void* rows, int64_t stride) {
  using L = Lanes<W, K>;
  using Columns = std::make_integer_sequence<int, kTile>;
  constexpr int kBytes = kBfloat16 ? 2 : 4;
  const int64_t step = L::kRows * stride * kBytes / 4;  // words from lane to lane
  const typename W::Vec factor = W::set1(multiplier);
  for (int64_t t = 0; t < in_tiles; ++t) {
    const uint32_t* tile = codes + t * 8 * K;
    prefetch_codes<W, K>(tile, next);
    for (int part = 0; part < L::kVectors; ++part) {
      const LaneWords<W, K> words(tile, next, part);
      char* row = static_cast<char*>(rows) + (part * W::kLanes * L::kRows * stride + t * kTile) * kBytes;
      decode_row<0, W, K, kBfloat16>(words, factor, row, step, Columns());
      if constexpr (L::kRows == 2) {
        decode_row<kTile, W, K, kBfloat16>(words, factor, row + stride * kBytes, step, Columns());
      }
    }
  }
}

// Symmetric quantization of the 16 columns of a tile to -127..127: one record.
template <class W>
void quantize_tile(const float* columns, uint32_t* record) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  uint32_t bits[kTile], largest = 0;  // magnitudes of floats are in the order of their bits
  std::memcpy(bits, columns, sizeof bits);
  for (int c = 0; c < kTile; ++c) largest = (bits[c] & 0x7fffffffu) > largest ? bits[c] & 0x7fffffffu : largest;
  float size;
  std::memcpy(&size, &largest, sizeof size);
  const float inverse = size > 1e-30f ? 127.0f / size : 0.0f;
  uint32_t total = 0;
  for (int c = 0; c < kTile; ++c) {
    const float shifted = columns[c] * inverse + kRound;
    int32_t q;
    std::memcpy(&q, &shifted, sizeof q);
    q -= 0x4B400000;
    total += static_cast<uint32_t>(q);
    record[c] = W::activation(q);
  }
  const float unit = size / 127.0f;
  std::memcpy(record + kTile, &unit, sizeof unit);
  record[kTile + 1] = 0u - static_cast<uint32_t>(kByteCentre) * total;
}

template <class W>
void arrange(const float* values, int64_t in_tiles, bool int8, int token, int tokens, uint32_t* activations) {
  const int64_t record = record_words(int8);
  for (int64_t t = 0; t < in_tiles; ++t) {
    uint32_t* to = activations + (t * tokens + token) * record;
    if (int8) {
      quantize_tile<W>(values + t * kTile, to);
    } else {
      std::memcpy(to, values + t * kTile, kTile * sizeof(float));
    }
  }
}

template <class W, int K>
constexpr void fill_rate(MatmulSteps& steps) {
  const MultiplyStep exact[4] = {multiply<W, K, 1, ExactRow>, multiply<W, K, 2, ExactRow>,
                                 multiply<W, K, 4, ExactRow>, multiply<W, K, 8, ExactRow>};
  const MultiplyStep int8[4] = {multiply<W, K, 1, Int8Row>, multiply<W, K, 2, Int8Row>, multiply<W, K, 4, Int8Row>,
                                multiply<W, K, 8, Int8Row>};
  for (int form = 0; form < 4; ++form) {
    steps.exact[K - 1][form] = exact[form];
    steps.int8[K - 1][form] = int8[form];
  }
  steps.tiles[K - 1] = Lanes<W, K>::kTiles;
  steps.decode_float[K - 1] = decode<W, K, false>;
  steps.decode_bfloat16[K - 1] = decode<W, K, true>;
}

template <class W, int... K>
constexpr MatmulSteps matmul_table(const char* name, std::integer_sequence<int, K...>) {
  MatmulSteps steps{};
  steps.name = name;
  (fill_rate<W, K + 1>(steps), ...);
  steps.arrange = arrange<W>;
  steps.rotate_input = rotate_input;
  steps.rotate_output = rotate_output;
  steps.rotate_columns = rotate_columns;
  steps.unrotate_input = unrotate_input;
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
