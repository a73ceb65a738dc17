#include "winding_steps_inl.h"

namespace hyper {
extern const WindingSteps kWindingNeon;
const WindingSteps kWindingNeon = winding_table();
}  // namespace hyper
