// Product for many tokens: every weight of `shift` is decoded once for up to 512 of them.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "dense_product.h"
#include "float16_inl.h"
#include "shift_layout.h"
#include "shift_matmul.h"

namespace hyper {
namespace {

template <class Form>
class ShiftWeight {
 public:
  // sums [tokens]: space
  ShiftWeight(const hyper_shift_plan& plan, const DenseSteps& dense, const uint32_t* codes, const uint16_t* scale,
              const uint16_t* out_scale, const char* x, int dtype, float* sums, char* y)
      : plan_(plan), codes_(codes), scale_(scale), out_scale_(out_scale), x_(x), y_(y), dtype_(dtype),
        size_(dtype == HYPER_FLOAT32 ? 4 : 2), layout_(plan), dense_(dense), sums_(sums) {}

  int64_t columns() const { return layout_.columns; }
  int64_t rows() const { return layout_.out_tiles * kTile; }

  void load(int64_t token, float* values) const { dense_.rotate(plan_, activations(token), dtype_, values); }
  void loaded(int64_t token, float sum) { sums_[token] = sum; }
  void load(int64_t token, float* values, uint16_t* rounded) {
    sums_[token] = dense_.rotate_and_round(plan_, activations(token), dtype_, values, rounded);
  }

  void decode(int64_t row_block, int64_t tile, int64_t tiles, typename Form::Panel* weights) const {
    // A last tile keeps itself company.
    const int64_t next = 2 * row_block + 1 < layout_.out_tiles ? layout_.tile_words : 0;
    const uint32_t* codes = codes_ + 2 * row_block * layout_.tile_words + tile * 8 * plan_.bits;
    if constexpr (kBytes) {
      dense_.decode_shift_bytes[plan_.bits - 1](codes, next, tiles, plan_.multiplier, weights);
    } else {
      dense_.decode_shift[plan_.bits - 1](codes, next, tiles, plan_.multiplier, weights);
    }
  }

  void finish(int64_t first, int64_t rows, int64_t tokens, const float* sums) const {
    float units[kStripeRows];
    for (int64_t r = 0; r < rows; ++r) {
      units[r] = from_float16(scale_[first + r]) * plan_.inverse_deviation * (kBytes ? 4 : 1);
    }
    float offset = plan_.mean_offset;
    if (kBytes) offset = mean_byte_quarter(kByteCentre + offset) - kQuarterCentre;
    dense_.finish_shift(plan_, first, rows, sums, tokens, offset, sums_, units, out_scale_, dtype_, y_);
  }

 private:
  static constexpr bool kBytes = std::is_same_v<Form, Bytes>;

  const char* activations(int64_t token) const { return x_ + token * plan_.in_features * size_; }

  const hyper_shift_plan& plan_;
  const uint32_t* codes_;
  const uint16_t *scale_, *out_scale_;
  const char* x_;
  char* y_;
  const int dtype_, size_;
  const ShiftLayout layout_;
  const DenseSteps& dense_;
  float* sums_;  // of each token's rotated values
};

template <class Form>
void multiply(const hyper_shift_plan& plan, const DenseSteps& steps, const uint32_t* codes, const uint16_t* scale,
              const uint16_t* out_scale, const char* x, int dtype, int64_t tokens, int threads, char* y) {
  const int64_t size = dtype == HYPER_FLOAT32 ? 4 : 2;
  in_parts(plan.out_features, tokens, threads, [&](int64_t begin, int64_t count, int on_threads) {
    static thread_local std::vector<float> sums;
    sums.resize(static_cast<size_t>(count));
    ShiftWeight<Form> weight(plan, steps, codes, scale, out_scale, x + begin * plan.in_features * size, dtype,
                             sums.data(), y + begin * plan.out_features * size);
    DenseProduct<Form, ShiftWeight<Form>>(weight, steps, count, on_threads).run(on_threads);
  });
}

}  // namespace

bool multiply_shift_dense(const hyper_shift_plan& plan, const uint32_t* codes, const uint16_t* scale,
                          const uint16_t* out_scale, const void* x, int dtype, int64_t tokens, bool int8, int threads,
                          void* y) {
  const DenseSteps* steps = dense_steps();
  if (steps == nullptr) return false;
  const auto run = int8 ? multiply<Bytes> : multiply<Pairs>;
  run(plan, *steps, codes, scale, out_scale, static_cast<const char*>(x), dtype, tokens, threads,
      static_cast<char*>(y));
  return true;
}

}  // namespace hyper
