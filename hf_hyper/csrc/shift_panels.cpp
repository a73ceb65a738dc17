// The parts of a product for many tokens, between which the caller runs a matrix product of its own library: rotated
// activations, panels of decoded rows, and the way back from the rotated basis.
//
// Panels hold centred byte sums, not weights: they are integers of -510..510, so that bfloat16 rounds only those beyond
// 256, and the scale of a row is applied to the product in float.
#include <vector>

#include "float16_inl.h"
#include "shift_matmul.h"
#include "shift_rows.h"
#include "thread_pool.h"

namespace hyper {

void rotate_tokens(const hyper_shift_plan& plan, const void* x, int dtype, int64_t tokens, int threads, void* rotated,
                   int rotated_dtype, float* sums) {
  const MatmulSteps& steps = matmul_steps();
  const int64_t columns = ShiftLayout(plan).columns;
  const int64_t size = dtype == HYPER_FLOAT32 ? 4 : 2;
  const bool narrow = rotated_dtype == HYPER_BFLOAT16;
  WorkCounter work(tokens, 1);
  run_on_threads(threads, [&] {
    std::vector<float> buffer(narrow ? columns : 0);
    int64_t begin, end;
    while (work.take(&begin, &end)) {
      float* values = narrow ? buffer.data() : static_cast<float*>(rotated) + begin * columns;
      sums[begin] =
          steps.rotate_input(plan, static_cast<const char*>(x) + begin * plan.in_features * size, dtype, values);
      if (narrow) steps.to_bfloat16(values, columns, static_cast<uint16_t*>(rotated) + begin * columns);
    }
  });
}

void decode_rows(const hyper_shift_plan& plan, const uint32_t* codes, int64_t first_tile, int64_t tiles, int threads,
                 void* rows, int rows_dtype) {
  const ShiftLayout layout(plan);
  const RowDecoder decoder(plan, codes, rows_dtype);
  const int64_t size = rows_dtype == HYPER_BFLOAT16 ? 2 : 4;
  WorkCounter work(tiles, 1);
  run_on_threads(threads, [&] {
    int64_t tile, end;
    while (work.take(&tile, &end)) {
      decoder.decode(first_tile + tile, end - tile, 0, layout.in_tiles,
                     static_cast<char*>(rows) + tile * kTile * layout.columns * size, layout.columns);
    }
  });
}

void finish_tokens(const hyper_shift_plan& plan, const void* product, int product_dtype, int64_t first_tile,
                   int64_t tiles, const float* sums, const uint16_t* scale, const uint16_t* out_scale, int64_t tokens,
                   int threads, void* y, int dtype) {
  const MatmulSteps& steps = matmul_steps();
  const int64_t rows = tiles * kTile, size = dtype == HYPER_FLOAT32 ? 4 : 2;
  const int64_t product_size = product_dtype == HYPER_FLOAT32 ? 4 : 2;
  const int64_t first_block = first_tile * kTile / plan.output_block, blocks = rows / plan.output_block;
  std::vector<float> units(rows);
  for (int64_t r = 0; r < rows; ++r) units[r] = from_float16(scale[first_tile * kTile + r]) * plan.inverse_deviation;
  WorkCounter work(tokens, 1);
  run_on_threads(threads, [&] {
    std::vector<float> values(rows);
    int64_t token, end;
    while (work.take(&token, &end)) {
      steps.scale_product(static_cast<const char*>(product) + token * rows * product_size, product_dtype, rows,
                          units.data(), plan.mean_offset * sums[token], values.data());
      for (int64_t block = 0; block < blocks; ++block) {
        steps.rotate_output(plan, first_block + block, out_scale, values.data() + block * plan.output_block, 1, 0, dtype,
                            static_cast<char*>(y) + token * plan.out_features * size);
      }
    }
  });
}

}  // namespace hyper
