// One operator for one type and one provider, as ONNX Runtime is told of it.
//
//   HouseholderReflection              (X, U, V)                          → Y
//   HouseholderReflectionRows          (X, A, U, V)                       → Y
//   HouseholderReflectionGroup{k}      (X, U_1, V_1, …, U_k, V_k)         → Y_1 … Y_k       k = 2 … 8
//   HouseholderReflectionRowsGroup{k}  (X, A, U_1, V_1, …, U_k, V_k)      → Y_1 … Y_k       k = 2 … 8
#pragma once

#include <array>
#include <cstddef>

#include "factor_memory.h"
#include "ort_abi.h"
#include "task.h"

namespace hra::ort {

constexpr int kOperatorVersion = 1;
constexpr size_t kMaxMembers = 8;

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
  const void* packed = nullptr;  // its factors as `cpu::Pack` leaves them, if all of them are constants
  int64_t features = -1;         // d and the ranks of packed factors
  std::array<int64_t, kMaxMembers> ranks{};
};

// Packs a node's constant factors, for the CPU. Returns null or an error.
OrtStatus* PackFactors(const OrtKernelInfo* info, Kernel* kernel);

// Reads a node's tensors, checks their shapes, allocates the outputs and runs the kernel of the operator's provider.
//
// Returns null, or an error status with the operator's name, what was expected and what came.
OrtStatus* Compute(const Kernel& kernel, OrtKernelContext* context);

}  // namespace hra::ort
