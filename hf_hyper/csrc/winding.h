// Nearest nodes of `winding`. Arguments as in hyper.h, already checked.
#pragma once

#include <cstdint>

namespace hyper {

// False if a coordinate is NaN or infinite.
bool nearest_nodes(const float* points, int64_t n, const float* nodes, int64_t num_nodes, int threads,
                   int32_t* index);

}  // namespace hyper
