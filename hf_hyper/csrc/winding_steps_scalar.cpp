#include "winding_steps_inl.h"

namespace hyper {
extern const WindingSteps kWindingScalar;
const WindingSteps kWindingScalar = winding_table();
}  // namespace hyper
