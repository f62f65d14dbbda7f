// Constant factors in the order in which few rows read them: one stream, which processors fetch ahead of time.
//
//     U_1 … U_k, then V_1 … V_k in tiles: r rows of 64 columns (the last tile has what is left), and so on
//
// Where V_i = M_i U_iᵀ is found to hold, as of nearly every Householder chain, U_iᵀ stands in tiles in the place of U_i
// and M_i in that of V_i: half of the bytes. They come from memory, and that is the time it takes. In half precision V
// is rounded too much for that.
//
// Read where they are, V is r streams that end after d elements: 21 GB/s instead of 33 GB/s on one core (Zen 5,
// d = 576, r = 8). Every factor starts at a cache line.
//
// Letters: d features, r rank, k members.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu_kernels.h"
#include "task.h"

namespace hra::cpu {

constexpr int64_t kFewRows = 12;  // of more rows, factors are not read packed

// Of the type, in bytes.
constexpr int64_t SizeOf(Type type) { return type == Type::kFloat32 ? 4 : 2; }

struct PackedMember {
  int64_t rank;
  const unsigned char* u;  // U as it is, or tiles of Uᵀ where M is there
  const unsigned char* v;  // tiles of V, or null
  const float* m;          // (r, r), or null
};

struct PackedFactors {
  int64_t features;
  std::array<PackedMember, kMaxMembers> members;
};

// How the factors of a task are packed. The task has no index, at most `kMaxMembers` members, and of it only the type,
// d, the ranks, U and V count.
class Packing {
 public:
  explicit Packing(const Task& task);

  int64_t Bytes() const { return bytes_; }

  // Writes them to memory of that many bytes, which starts at a cache line.
  PackedFactors To(void* memory) const;

 private:
  const Task& task_;
  std::array<std::vector<float>, kMaxMembers> m_;  // empty: V is packed
  int64_t bytes_ = 0;
};

}  // namespace hra::cpu
