// The arithmetic of the CPU reflection, as a table of functions for each set of instructions.
//
// Letters: d features, r rank, n rows of X. All matrices are row-major; X and Y have d columns, U has r, V has d.
// Sums are in float32, whatever the type; results are rounded once, to nearest even.
#pragma once

#include <cstdint>

#include "task.h"

namespace hra::cpu {

constexpr int64_t kPackedColumns = 64;  // of a tile of packed factors
constexpr int64_t kPanelColumns = 4;  // columns of U that are packed together
constexpr int64_t kPanelDepth = 768;  // rows of U in a packed block; with it, what a block of X needs stays in L1
constexpr int64_t kBlockBytes = 8192;  // how far ahead memory is asked for: bandwidth × latency, about doubled

namespace {

// To whole panels.
constexpr int64_t PaddedRank(int64_t rank) { return (rank + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }

// Asks for memory that is needed soon; addresses outside of what exists do no harm.
inline void Prefetch(const void* first, int64_t bytes) {
#if defined(__GNUC__)
  const char* at = static_cast<const char*>(first);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
#else
  (void)first, (void)bytes;
#endif
}

}  // namespace

// What a kernel is given of X: rows whose first element is at `x`.
struct Rows {
  const void* x;
  int64_t count;     // n
  int64_t features;  // d
};

// For one type. Nothing is read or written outside of the matrices; no alignment is expected.
struct Kernels {
  // T = X[:, begin:end] U[begin:end, :], (n, r) without gaps: for few rows, reads U once as it lies in memory.
  void (*project)(const Rows& rows, const void* u, int64_t rank, int64_t begin, int64_t end, float* t);

  // The same of tiles of Uᵀ, the first of them at column `begin`. `sums` is room for n · PaddedRank(r) · lanes floats.
  void (*project_tiles)(const Rows& rows, const void* tiles, int64_t rank, int64_t begin, int64_t end, float* sums,
                        float* t);

  // Transposes U[begin:end, column:column + 4] into a panel of 4 · PaddedDepth(end − begin) floats: for every `lanes`
  // rows of U, those of its first column, of its second … Zeros stand where U has ended.
  void (*pack)(const void* u, int64_t rank, int64_t begin, int64_t end, int64_t column, float* panel);

  // T[:, 0:4] += X[:, begin:end] panel; `stride` is T's.
  void (*multiply)(const Rows& rows, const float* panel, int64_t begin, int64_t end, float* t, int64_t stride);

  // Y[:, begin:end] = X[:, begin:end] + T V[:, begin:end]; `y` is where Y of the first row starts, `v` where V's column
  // `begin` does, and V's rows are `width` elements apart.
  void (*update)(const Rows& rows, const float* t, int64_t stride, const void* v, int64_t width, int64_t rank,
                 int64_t begin, int64_t end, void* y);
};

// One set of instructions.
struct Instructions {
  const char* name;  // `avx512`, `avx2` or `baseline`
  int64_t lanes;     // floats in a vector
  Kernels float32, float16, bfloat16;

  const Kernels& For(Type type) const {
    return type == Type::kFloat32 ? float32 : type == Type::kFloat16 ? float16 : bfloat16;
  }
  int64_t PaddedDepth(int64_t depth) const { return (depth + lanes - 1) / lanes * lanes; }
};

// Constants of their files, which hold no code that runs by itself: a machine without AVX-512 never executes any of it.
extern const Instructions kBaseline;
#ifdef HRA_X86
extern const Instructions kAvx2, kAvx512;
#endif

}  // namespace hra::cpu
