// One call of a reflection operator, whatever runs it: Y_i = X + (X U_i) V_i for every member i of a group.
//
// Letters: d features, r rank, n rows of X, a adapters.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hra {

constexpr size_t kMaxMembers = 8;  // of a group in a graph

enum class Type { kFloat32, kFloat16, kBFloat16 };

// One (U, V) → Y. All pointers are to contiguous memory of the task's type.
struct Member {
  const void* u;     // (a, d, r); a = 1 without an index
  const void* v;     // (a, r, d)
  void* y;           // (n, d); never X's own memory
  int64_t rank;      // r; 0 makes Y = X
  int64_t adapters;  // a
};

// A group of members that share X; a single reflection is a group of one.
struct Task {
  Type type;
  const void* x;           // (n, d)
  int64_t rows;            // n; may be 0
  int64_t features;        // d; may be 0
  const int64_t* index;    // adapter of rows i · rows_per_index …; null for one adapter
  int64_t rows_per_index;  // how many rows of X share an entry of the index
  const Member* members;
  int64_t count;
};

// Runs work(data, i) for 0 ≤ i < n, perhaps at the same time on several threads, and returns when all are done.
// It may as well run all on the calling thread, one after the other.
struct Parallel {
  void (*run)(const Parallel& self, void (*work)(void* data, size_t i), size_t n, void* data);
  void* pool;
  int threads;  // how many can be expected to run at the same time
};

}  // namespace hra
