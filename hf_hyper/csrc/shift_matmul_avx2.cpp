#include "rotation_inl.h"
#include "shift_matmul_inl.h"
#include "simd/words_avx2.h"

namespace hyper {
extern const MatmulSteps kMatmulAvx2;
const MatmulSteps kMatmulAvx2 = matmul_table<WordsAvx2>("avx2");
}  // namespace hyper
