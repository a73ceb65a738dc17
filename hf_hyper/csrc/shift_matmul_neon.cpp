#include "rotation_inl.h"
#include "shift_matmul_inl.h"
#include "simd/words_neon.h"

namespace hyper {
extern const MatmulSteps kMatmulNeon;
const MatmulSteps kMatmulNeon = matmul_table<WordsNeon>("neon");
}  // namespace hyper
