// The reflection on the CPU: vectors and threads.
//
// Limits: r · d and n · d of one member must be below 2⁶³ bytes; a group has at most `kMaxMembers`.
#pragma once

#include "cpu_kernels.h"
#include "cpu_packing.h"
#include "task.h"

namespace hra {

// Runs a task with the best instructions of this machine; sums are in float32, and results are rounded once.
// They depend on the task and the instructions, to the bit; not on threads.
//
// `packed` is null, or the same U and V packed: few rows are read from there, faster, and many rows from U and V. Where
// V has become M Uᵀ, Y's last bits are others than without, and its error is of the same size (for the bound, see
// cpu_coefficients.h). Only for a task without index.
//
// Returns null, or what is wrong: an index that names no adapter, or no memory. Y may then hold anything.
const char* ReflectOnCpu(const Task& task, const Parallel& parallel, const cpu::PackedFactors* packed = nullptr);

// The same with given instructions, which the machine must have.
const char* ReflectOnCpuWith(const cpu::Instructions& instructions, const Task& task, const Parallel& parallel,
                             const cpu::PackedFactors* packed = nullptr);

}  // namespace hra
