// Bodies of the product kernels for few tokens and of the decoder of rows. Compiled once per instruction set, with internal
// linkage.
#pragma once

#include <cstring>

#include "shift_lanes_inl.h"

namespace hyper {
namespace {

// Sums of one row of every lane, for T tokens: of float activations,
template <class W, int T>
struct FloatRow {
  static constexpr int kRecord = record_words(kFloat);
  static constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;  // enough independent sums to hide the latency of fma
  typename W::Float total[T][kChains];

  HYPER_INLINE FloatRow() {
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

// of 16-bit activations, tile by tile as integers and two columns at a time,
template <class W, int T>
struct Int16Row {
  static_assert(kTile * 3LL * kByteCentre * 32767 < INT32_MAX, "uncentred sums and what centres them fit");
  static constexpr int kRecord = record_words(kInt16);
  typename W::Vec first;  // hash of the first column of a pair
  typename W::Vec dot[T];
  typename W::Float total[T];

  HYPER_INLINE Int16Row() {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) total[m] = W::zero();
  }
  HYPER_INLINE void begin(const uint32_t* values) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) dot[m] = W::set1(values[m * kRecord + kTile / 2 + 1]);
  }
  template <int C>
  HYPER_INLINE void add(typename W::Vec hash, const uint32_t* values) {
    if constexpr (C % 2 == 0) {
      first = hash;
    } else {
      const typename W::Vec sums = W::byte_sums(first, hash);
      HYPER_UNROLL
      for (int m = 0; m < T; ++m) dot[m] = W::dot_pair(dot[m], sums, values + m * kRecord + C / 2);
    }
  }
  HYPER_INLINE void end(const uint32_t* values) {
    HYPER_UNROLL
    for (int m = 0; m < T; ++m) {
      total[m] = W::fma(W::to_float(dot[m]), W::spread(values + m * kRecord + kTile / 2), total[m]);
    }
  }
  HYPER_INLINE typename W::Float sum(int m) const { return total[m]; }
};

// and of 8-bit ones, column by column.
template <class W, int T>
struct Int8Row {
  static_assert(T == 1, "of a single token");
  static constexpr int kRecord = record_words(kInt8);
  typename W::Vec dot[2];  // two sums hide the latency better than one
  typename W::Float total = W::zero();

  HYPER_INLINE void begin(const uint32_t* values) {
    dot[0] = W::set1(values[kTile + 1]);
    dot[1] = W::set1(0);
  }
  template <int C>
  HYPER_INLINE void add(typename W::Vec hash, const uint32_t* values) {
    dot[C % 2] = W::dot(dot[C % 2], hash, W::set1(values[C]));
  }
  HYPER_INLINE void end(const uint32_t* values) {
    total = W::fma(W::to_float(W::add(dot[0], dot[1])), W::spread(values + kTile), total);
  }
  HYPER_INLINE typename W::Float sum(int) const { return total; }
};

template <int kFirst, class W, int K, class Row, int... C>
HYPER_INLINE void multiply_row(const LaneWords<W, K>& words, typename W::Vec multiplier, const uint32_t* values, Row& row,
                               std::integer_sequence<int, C...>) {
  row.begin(values);
  if constexpr (K <= 7) {
    // All states first: side by side with the products of another tile they keep more of the processor's units busy.
    const typename W::Vec state[kTile] = {words.template state<kFirst + C>()...};
    (row.template add<C>(W::multiply(state[C], multiplier), values), ...);
  } else {  // they would not fit in registers
    (row.template add<C>(W::multiply(words.template state<kFirst + C>(), multiplier), values), ...);
  }
  row.end(values);
}

template <class W, int K, int T, template <class, int> class Row>
void multiply(const uint32_t* codes, int64_t in_tiles, const uint32_t* activations, uint32_t multiplier,
              float* totals) {
  using L = Lanes<W, K>;
  using Columns = std::make_integer_sequence<int, kTile>;
  const typename W::Vec factor = W::set1(multiplier);
  for (int part = 0; part < L::kVectors; ++part) {
    Row<W, T> row[L::kRows];
    const uint32_t *tile = codes, *values = activations;
    LaneWords<W, K> ahead(tile, part);  // of the next tile: nothing waits for their sorting
    for (int64_t t = 1; t <= in_tiles; ++t, values += T * Row<W, T>::kRecord) {
      if (part == 0) prefetch_ahead<K>(tile);
      const LaneWords<W, K> words = ahead;
      if (t < in_tiles) tile += 8 * K;
      ahead = LaneWords<W, K>(tile, part);
      multiply_row<0>(words, factor, values, row[0], Columns());
      if constexpr (L::kRows == 2) multiply_row<kTile>(words, factor, values, row[1], Columns());
    }
    for (int r = 0; r < L::kRows; ++r) {
      for (int m = 0; m < T; ++m) {
        float lane[W::kLanes];
        W::store(lane, row[r].sum(m));
        float* to = totals + m * kTile + part * W::kLanes * L::kRows + r;
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
void decode(const uint32_t* codes, int64_t in_tiles, uint32_t multiplier, void* rows, int64_t stride) {
  using L = Lanes<W, K>;
  using Columns = std::make_integer_sequence<int, kTile>;
  constexpr int kBytes = kBfloat16 ? 2 : 4;
  const int64_t step = L::kRows * stride * kBytes / 4;  // words from lane to lane
  const typename W::Vec factor = W::set1(multiplier);
  for (int64_t t = 0; t < in_tiles; ++t) {
    const uint32_t* tile = codes + t * 8 * K;
    prefetch_ahead<K>(tile);
    for (int part = 0; part < L::kVectors; ++part) {
      const LaneWords<W, K> words(tile, part);
      char* row = static_cast<char*>(rows) + (part * W::kLanes * L::kRows * stride + t * kTile) * kBytes;
      decode_row<0, W, K, kBfloat16>(words, factor, row, step, Columns());
      if constexpr (L::kRows == 2) {
        decode_row<kTile, W, K, kBfloat16>(words, factor, row + stride * kBytes, step, Columns());
      }
    }
  }
}

// Symmetric quantization of the 16 columns of a tile to -limit..limit -> what one unit stands for.
inline float quantize_tile(const float* columns, float limit, int32_t* integers) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  uint32_t bits[kTile], largest = 0;  // magnitudes of floats are in the order of their bits
  std::memcpy(bits, columns, sizeof bits);
  for (int c = 0; c < kTile; ++c) largest = (bits[c] & 0x7fffffffu) > largest ? bits[c] & 0x7fffffffu : largest;
  float size;
  std::memcpy(&size, &largest, sizeof size);
  const float inverse = size > 1e-33f ? limit / size : 0.0f;  // both units stay normal numbers
  for (int c = 0; c < kTile; ++c) {
    const float shifted = columns[c] * inverse + kRound;
    std::memcpy(integers + c, &shifted, sizeof shifted);
    integers[c] -= 0x4B400000;
  }
  return size / limit;
}

// One record of integers.
template <class W>
void arrange_integers(const float* columns, Activations kind, uint32_t* record) {
  int32_t integers[kTile];
  const float unit = quantize_tile(columns, kind == kInt16 ? 32767.0f : 127.0f, integers);
  uint32_t total = 0;
  for (int c = 0; c < kTile; ++c) total += static_cast<uint32_t>(integers[c]);
  if (kind == kInt16) {
    for (int c = 0; c < kTile; c += 2) {
      *record++ = (static_cast<uint32_t>(integers[c]) & 65535) | static_cast<uint32_t>(integers[c + 1]) << 16;
    }
  } else {
    for (int c = 0; c < kTile; ++c) *record++ = W::activation(integers[c]);
  }
  std::memcpy(record, &unit, sizeof unit);
  record[1] = 0u - static_cast<uint32_t>(kByteCentre) * total;
}

template <class W>
void arrange(const float* values, int64_t in_tiles, Activations kind, int token, int tokens, uint32_t* activations) {
  const int64_t record = record_words(kind);
  for (int64_t t = 0; t < in_tiles; ++t) {
    uint32_t* to = activations + (t * tokens + token) * record;
    if (kind == kFloat) {
      std::memcpy(to, values + t * kTile, kTile * sizeof(float));
    } else {
      arrange_integers<W>(values + t * kTile, kind, to);
    }
  }
}

template <class W, int K, template <class, int> class Row>
constexpr void fill_forms(MultiplyStep (&forms)[4]) {
  forms[0] = multiply<W, K, kTokenForms[0], Row>;
  forms[1] = multiply<W, K, kTokenForms[1], Row>;
  forms[2] = multiply<W, K, kTokenForms[2], Row>;
  forms[3] = multiply<W, K, kTokenForms[3], Row>;
}

template <class W, int K>
constexpr void fill_rate(MatmulSteps& steps) {
  fill_forms<W, K, FloatRow>(steps.multiply[kFloat][K - 1]);
  if constexpr (W::kPairs) fill_forms<W, K, Int16Row>(steps.multiply[kInt16][K - 1]);
  steps.multiply[kInt8][K - 1][0] = multiply<W, K, 1, Int8Row>;
  steps.decode_float[K - 1] = decode<W, K, false>;
  steps.decode_bfloat16[K - 1] = decode<W, K, true>;
}

template <class W, int... K>
constexpr MatmulSteps matmul_table(const char* name, std::integer_sequence<int, K...>) {
  MatmulSteps steps{};
  steps.name = name;
  steps.int16 = W::kPairs;
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
