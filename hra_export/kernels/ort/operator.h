// One operator for one type and one provider, as ONNX Runtime is told of it.
//
//   HouseholderReflection              (X, U, V)                          → Y
//   HouseholderReflectionRows          (X, A, U, V)                       → Y
//   HouseholderReflectionGroup{k}      (X, U_1, V_1, …, U_k, V_k)         → Y_1 … Y_k       k = 2 … 8
//   HouseholderReflectionRowsGroup{k}  (X, A, U_1, V_1, …, U_k, V_k)      → Y_1 … Y_k       k = 2 … 8
#pragma once

#include <array>
#include <cstddef>

#include "cpu_packing.h"
#include "factor_memory.h"
#include "ort_abi.h"
#include "task.h"

namespace hra::ort {

constexpr int kOperatorVersion = 1;

enum class Provider { kCpu, kCuda };

struct Operator : OrtCustomOp {
  const OrtApi* api;
  std::array<char, 48> name;
  Type type;
  Provider provider;
  size_t members;  // k; 1 for a single reflection
  bool has_rows;   // A is there

  size_t FirstU() const { return has_rows ? 2 : 1; }
  size_t Inputs() const { return FirstU() + 2 * members; }
};

// One node of a graph.
struct Kernel {
  const Operator& op;
  FactorMemory memory;
  cpu::PackedFactors packed{-1, {}};  // of d = -1 unless all factors are constants
};

// Packs a node's constant factors, for the CPU. Returns null or an error.
OrtStatus* PackFactors(const OrtKernelInfo* info, Kernel* kernel);

// Reads a node's tensors, checks their shapes, allocates the outputs and runs the kernel of the operator's provider.
//
// Returns null, or an error status with the operator's name, what was expected and what came.
OrtStatus* Compute(const Kernel& kernel, OrtKernelContext* context);

}  // namespace hra::ort
