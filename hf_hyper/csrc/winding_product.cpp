// Products of `winding` straight from the codes, and decoding of rows for those that a library multiplies.
//
//     activations  --arrange-->  [groups, tokens, streams, 16] float, once per 8 tokens
//     threads take blocks of rows; a row is decoded 16 pairs at a time into registers, and multiplied there
//
// A weight costs two products of integers and a look-up among the shell sides; there is no table of nodes to fetch.
#include "winding_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "shift_matmul_steps.h"
#include "thread_pool.h"
#include "winding_layout.h"

namespace hyper {

extern const WindingSteps kWindingAvx512, kWindingAvx2, kWindingNeon, kWindingScalar;

const WindingSteps& winding_steps() {
#if defined(HYPER_X86)
  // The product tables of `shift` stand for at least these instructions.
  if (std::strcmp(matmul_steps().name, "avx512") == 0) return kWindingAvx512;
  if (std::strcmp(matmul_steps().name, "avx2") == 0) return kWindingAvx2;
#elif defined(HYPER_ARM64)
  if (std::strcmp(matmul_steps().name, "neon") == 0) return kWindingNeon;
#endif
  return kWindingScalar;
}

namespace {

constexpr int64_t kRows = 16;  // dealt to a thread at a time

int64_t size_of(int dtype) { return dtype == HYPER_FLOAT32 ? 4 : 2; }

}  // namespace

void multiply_winding(const hyper_winding_plan& plan, const uint32_t* codes, const float* centre,
                      const float* shell_side, const void* x, int dtype, int64_t tokens, int threads, void* y) {
  static thread_local std::vector<float> kept;
  std::vector<float>& activations = kept;
  const WindingSteps& steps = winding_steps();
  const WindingLayout layout(plan);
  const WindingConstants constants = constants_of(plan, centre, shell_side);
  const WindingRow& row_steps = steps.row[constants.near];
  for (int64_t begin = 0; begin < tokens; begin += kMaxTokens) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTokens, tokens - begin));
    const int form = token_form(count), wide = kTokenForms[form];
    activations.assign(static_cast<size_t>(layout.groups * wide * activation_streams(wide) * kPairs), 0.0f);
    float centre_share[kMaxTokens];
    for (int m = 0; m < count; ++m) {
      const char* from = static_cast<const char*>(x) + (begin + m) * plan.in_features * size_of(dtype);
      float totals[2];
      steps.arrange(from, dtype, plan.in_features, m, wide, activations.data(), totals);
      centre_share[m] = centre[0] * totals[0] + centre[1] * totals[1];
    }
    const float* arranged = activations.data();
    WorkCounter work(plan.out_features, kRows);
    run_on_threads(threads, [&] {
      float sums[kMaxTokens], block[kMaxTokens][kRows];
      int64_t first, end;
      while (work.take(&first, &end)) {
        for (int64_t row = first; row < end; ++row) {
          row_steps.multiply[form](constants, codes + row * layout.row_words,
                                   (plan.out_features - row) * layout.row_words, layout.groups, arranged, sums);
          for (int m = 0; m < count; ++m) block[m][row - first] = sums[m] + centre_share[m];
        }
        for (int m = 0; m < count; ++m) {
          steps.store(block[m], end - first, dtype, y, (begin + m) * plan.out_features + first);
        }
      }
    });
  }
}

void decode_winding(const hyper_winding_plan& plan, const uint32_t* codes, const float* centre,
                    const float* shell_side, int64_t first_row, int64_t rows, int threads, void* weights, int dtype) {
  const WindingSteps& steps = winding_steps();
  const WindingLayout layout(plan);
  const WindingConstants constants = constants_of(plan, centre, shell_side);
  WorkCounter work(rows, kRows);
  run_on_threads(threads, [&] {
    std::vector<float> decoded(static_cast<size_t>(layout.groups * 2 * kPairs));
    int64_t first, end;
    while (work.take(&first, &end)) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t row = first_row + i;
        steps.row[constants.near].decode(constants, codes + row * layout.row_words,
                                         (plan.out_features - row) * layout.row_words, layout.groups, decoded.data());
        steps.store(decoded.data(), plan.in_features, dtype, weights, i * plan.in_features);
      }
    }
  });
}

}  // namespace hyper
