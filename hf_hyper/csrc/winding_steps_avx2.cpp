#include "winding_steps_inl.h"

namespace hyper {
extern const WindingSteps kWindingAvx2;
const WindingSteps kWindingAvx2 = winding_table();
}  // namespace hyper
