#include "rotation_inl.h"
#include "shift_matmul_inl.h"
#include "simd/words_portable.h"

namespace hyper {
extern const MatmulSteps kMatmulScalar;
const MatmulSteps kMatmulScalar = matmul_table<WordsPortable>("scalar");
}  // namespace hyper
