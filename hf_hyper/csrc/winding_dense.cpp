// Product of `winding` for many tokens: every weight is decoded once for up to 512 of them.
#include <algorithm>
#include <cstring>
#include <vector>

#include "dense_product.h"
#include "winding_layout.h"
#include "winding_product.h"

namespace hyper {
namespace {

class WindingWeight {
 public:
  WindingWeight(const hyper_winding_plan& plan, const DenseSteps& dense, const uint32_t* codes, const float* centre,
                const float* shell_side, const char* x, int dtype, char* y)
      : plan_(plan), dense_(dense), layout_(plan), constants_(constants_of(plan, centre, shell_side)),
        decode_(winding_panels()[constants_.near]), codes_(codes), x_(x), y_(y), dtype_(dtype) {}

  int64_t columns() const { return (plan_.in_features + kTile - 1) / kTile * kTile; }
  int64_t rows() const { return (plan_.out_features + kTile - 1) / kTile * kTile; }

  void load(int64_t token, float* values, uint16_t* rounded) const {
    dense_.load(x_, dtype_, token * plan_.in_features, plan_.in_features, values);
    std::fill(values + plan_.in_features, values + columns(), 0.0f);
    dense_.round(values, columns(), rounded);
  }

  void decode(int64_t row_block, int64_t tile, int64_t tiles, uint16_t* weights) const {
    for (int v = 0; v < 2; ++v) {
      const uint32_t* rows[16];
      for (int r = 0; r < 16; ++r) {
        // Rows beyond the last repeat it.
        const int64_t row = std::min(row_block * kPanelRows + v * 16 + r, plan_.out_features - 1);
        rows[r] = codes_ + row * layout_.row_words;
      }
      decode_(constants_, rows, layout_.row_words, tile * kTile / 2, tiles * kTile / 2, weights + v * kStepValues / 2);
    }
  }

  void finish(int64_t first, int64_t rows, int64_t tokens, const float* sums) const {
    for (const int64_t end = first + rows; first < end; first += kPanelRows, sums += tokens * kPanelRows) {
      const int64_t there = std::min<int64_t>(kPanelRows, plan_.out_features - first);
      dense_.store(sums, tokens, there, dtype_, y_, first, plan_.out_features);
    }
  }

 private:
  const hyper_winding_plan& plan_;
  const DenseSteps& dense_;
  const WindingLayout layout_;
  const WindingConstants constants_;
  const DecodeWinding decode_;
  const uint32_t* codes_;
  const char* x_;
  char* y_;
  const int dtype_;
};

}  // namespace

bool multiply_winding_dense(const hyper_winding_plan& plan, const uint32_t* codes, const float* centre,
                            const float* shell_side, const void* x, int dtype, int64_t tokens, int threads, void* y) {
  const DenseSteps* steps = dense_steps();
  if (steps == nullptr) return false;
  const int64_t size = dtype == HYPER_FLOAT32 ? 4 : 2;
  in_parts(plan.out_features, tokens, threads, [&](int64_t begin, int64_t count, int on_threads) {
    WindingWeight weight(plan, *steps, codes, centre, shell_side,
                         static_cast<const char*>(x) + begin * plan.in_features * size, dtype,
                         static_cast<char*>(y) + begin * plan.out_features * size);
    DenseProduct<Pairs, WindingWeight>(weight, *steps, count, on_threads).run(on_threads);
  });
  return true;
}

}  // namespace hyper
