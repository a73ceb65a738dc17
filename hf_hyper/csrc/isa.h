// Run-time choice of the instruction set.
//
// Each isa_<name>.cpp is compiled with its own flags and fills one Kernels table from the templates in *_steps.h.
// All tables compute the same integers, so the choice changes time and nothing else.
#pragma once

#include "shift_steps.h"

namespace hyper {

struct Kernels {
  const char* name;
  ShiftSteps shift;
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

// The table in use; the best one that this machine runs unless select_kernels chose another.
const Kernels& kernels();

// False if the name is unknown or this machine lacks it; "auto" goes back to the best one.
bool select_kernels(const char* name);

// The table of that name, null if the name is unknown or this machine lacks it.
const Kernels* find_kernels(const char* name);

}  // namespace hyper
