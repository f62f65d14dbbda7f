// Which sets of instructions this machine has.
#pragma once

#include "cpu_kernels.h"

namespace hra::cpu {

// The best of this machine.
const Instructions& BestInstructions();

// The instructions of that name (`avx512`, `avx2` or `baseline`), or null where this machine or this build lacks them.
const Instructions* FindInstructions(const char* name);

}  // namespace hra::cpu
