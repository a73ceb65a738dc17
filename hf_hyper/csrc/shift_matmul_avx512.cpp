#include "rotation_inl.h"
#include "shift_matmul_inl.h"
#include "simd/words_avx512.h"

namespace hyper {
extern const MatmulSteps kMatmulAvx512;
const MatmulSteps kMatmulAvx512 = matmul_table<WordsAvx512>("avx512");
}  // namespace hyper
