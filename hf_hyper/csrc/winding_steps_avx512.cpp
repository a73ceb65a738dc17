#include "winding_steps_inl.h"

namespace hyper {
extern const WindingSteps kWindingAvx512;
const WindingSteps kWindingAvx512 = winding_table();
}  // namespace hyper
