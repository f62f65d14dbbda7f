// The reflection on CUDA devices: which kernel, cut how.
//
// What must move. Y = X + (X U) V reads U, V (2 d r elements) and X, writes Y (2 n d), and does 4 n d r operations.
//   decode, n = 1, d = 4096, r = 8, bfloat16: 131 KB of U and V and 16 KB of X and Y. At an H100's 3.35 TB/s that is
//   0.04 µs, far below a launch (2 to 3 µs, 1 to 2 in a CUDA graph): the number of launches and of waits for memory is
//   all that counts. d = 14336, r = 64: 3.7 MB, 1.1 µs.
//   prefill, n = d = 4096, r = 8, bfloat16: 67 MB of X and Y, 20 µs; 0.5 GFLOP, nothing on tensor cores, and 9 µs at
//   the peak of the float32 units, which r = 64 would make 72 µs: hence tensor cores.
// These are computed floors, not measurements.
//
// One launch. X U needs all of d before the first column of Y, so blocks that share a row must meet. With clusters
// (compute capability 9.0) up to 8 blocks each take a slice of d, add their sums through distributed shared memory and
// go on with their own slice of Y: U and V are read once for a tile of rows, nothing is written in between, and nobody
// has to be resident but the cluster itself. X is read again from the cache, where the block has just left it. Without
// clusters (8.0) each block sums over all of d, again from the L2 cache, and only the columns of Y are shared out, as
// long as rows alone do not fill the device; at prefill X may then come from memory twice, half as much again as must.
// Members run side by side while blocks are few; when the rows alone fill the device, one block does all members of
// its rows, so that X comes from memory once.
//
// Two kernels: `ReflectByVectors` (1 to 4 rows a block; float32 up to 8, in IEEE arithmetic, no TF32; any rank) waits
// for memory about twice: for X with U, with V on its way to the L2 cache meanwhile, and for V. `ReflectByTiles` has up
// to 64 rows a block on tensor cores, so that U and V, which come from the L2 cache once for every tile of rows, stay
// below the traffic of X and Y up to r = 64.
//
// Limits: float32 at prefill does without tensor cores, and above r = 8 the L2 cache bounds it. In float16 a product
// X U beyond 65504 becomes infinite in `ReflectByTiles`, as in the operator's function body. The rank of a call is
// bounded by shared memory (some 20 000).
#include "cuda_reflection.h"

#include "cuda_matrix.cuh"
#include "cuda_vector.cuh"

namespace hra {
namespace {

constexpr int64_t kMaxTileRank = 128;
constexpr int64_t kMaxVectorRows = 4;  // above, float16 and bfloat16 go to the tensor cores
constexpr int64_t kMinSliceWidth = 64;
constexpr int64_t kMaxBlocks = 2147483647;

using Kernel = void (*)(Problem);

struct Plan {
  Kernel kernel;
  int64_t blocks;
  int cluster;
  int64_t shared_bytes;
};

bool IsAligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
Problem Describe(const Task& task, int64_t first, int64_t count) {
  constexpr int64_t kWide = 16 / sizeof(T);
  constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
  const int64_t d = task.features;
  Problem problem = {};
  problem.x = task.x;
  problem.index = task.index;
  problem.features = d;
  problem.rows_per_entry = task.index == nullptr ? task.rows : task.rows_per_index;
  problem.count = static_cast<int>(count);
  problem.x_quads = d % 4 == 0 && IsAligned(task.x, 4 * sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    const Member& member = task.members[first + i];
    problem.members[i] = member;
    if (member.rank > problem.largest_rank) problem.largest_rank = member.rank;
    problem.x_quads = problem.x_quads && IsAligned(member.y, 4 * sizeof(T));
    problem.u_wide[i] = member.rank % kWide == 0 && IsAligned(member.u, 16);
    problem.u_pairs[i] = member.rank % kPair == 0 && IsAligned(member.u, 4);
    problem.v_pairs[i] = d % kPair == 0 && IsAligned(member.v, 4);
  }
  return problem;
}

// Cuts the features into slices and the rows into tiles of `smallest` to `largest` rows, the smallest of them that does
// not make more than two blocks for each multiprocessor. Without clusters every slice sums over all of d again: there
// are then no more slices than it takes to have as many blocks. Returns the number of tiles.
int64_t Cut(Problem& problem, int64_t rows, int64_t smallest, int64_t largest, bool clusters, int multiprocessors) {
  const int64_t entries = rows / problem.rows_per_entry;
  int64_t slices = 1;
  int64_t tile_rows = smallest;
  const auto is_full = [&] {
    return entries * CeilDiv(problem.rows_per_entry, tile_rows) * slices * problem.count > 2 * multiprocessors;
  };
  while (slices < kMaxSlices && problem.features >= 2 * slices * kMinSliceWidth) slices *= 2;
  while (!clusters && slices > 1 && is_full()) slices /= 2;
  while (tile_rows < largest && tile_rows < problem.rows_per_entry && is_full()) tile_rows *= 2;
  problem.slices = static_cast<int>(slices);
  problem.slice_width = static_cast<int>(CeilDiv(CeilDiv(problem.features, slices), 16) * 16);
  problem.tile_rows = static_cast<int>(tile_rows);
  problem.tiles_per_entry = CeilDiv(problem.rows_per_entry, tile_rows);
  return entries * problem.tiles_per_entry;
}

template <class T, bool kCluster>
Kernel VectorKernel(int64_t rows) {
  if constexpr (sizeof(T) == 4)
    if (rows == 8) return ReflectByVectors<T, 8, kCluster>;
  if (rows == 4) return ReflectByVectors<T, 4, kCluster>;
  return rows == 2 ? ReflectByVectors<T, 2, kCluster> : ReflectByVectors<T, 1, kCluster>;
}

template <class T, bool kCluster>
Kernel TileKernel(int64_t rank) {
  if (rank <= 16) return ReflectByTiles<T, 4, 1, kCluster>;
  if (rank <= 32) return ReflectByTiles<T, 4, 2, kCluster>;
  return rank <= 64 ? ReflectByTiles<T, 4, 4, kCluster> : ReflectByTiles<T, 2, 8, kCluster>;
}

// How ReflectByTiles does it. The cut of the problem is filled in.
template <class T>
Plan PlanTiles(Problem& problem, int64_t rows, int64_t rank, const device::Properties& properties) {
  const bool clusters = properties.compute_major >= 9;
  const int64_t tiles = Cut(problem, rows, 16, rank <= 64 ? 64 : 32, clusters, properties.multiprocessors);
  const int rank_tiles = static_cast<int>(CeilDiv(rank, device::kTile));
  const int64_t bytes = device::MatrixBytes(problem.tile_rows / device::kTile, rank_tiles);
  const Kernel kernel = clusters ? TileKernel<T, true>(rank) : TileKernel<T, false>(rank);
  return {kernel, tiles * problem.slices, clusters ? problem.slices : 1, bytes};
}

// How ReflectByVectors does it: with fewer rows, and then without clusters, where shared memory is short.
template <class T>
Plan PlanVectors(Problem& problem, int64_t rows, int64_t rank, const device::Properties& properties) {
  const auto bytes = [&](int64_t of, bool clusters) {
    return device::VectorBytes<T>(of, rank, clusters ? kMaxSlices : 0);
  };
  int64_t most = sizeof(T) == 4 ? 8 : kMaxVectorRows;
  while (most > 1 && bytes(most, true) > properties.shared_limit) most /= 2;
  const bool clusters = properties.compute_major >= 9 && bytes(most, true) <= properties.shared_limit;
  int64_t tile_rows = 1;
  while (tile_rows < most && tile_rows < problem.rows_per_entry) tile_rows *= 2;
  const int64_t tiles = Cut(problem, rows, tile_rows, tile_rows, clusters, properties.multiprocessors);
  const Kernel kernel = clusters ? VectorKernel<T, true>(tile_rows) : VectorKernel<T, false>(tile_rows);
  return {kernel, tiles * problem.slices, clusters ? problem.slices : 1, bytes(tile_rows, clusters)};
}

template <class T>
Plan MakePlan(Problem& problem, int64_t rows, const device::Properties& properties) {
  const int64_t rank = problem.largest_rank;
  if constexpr (sizeof(T) == 2)
    if (rank <= kMaxTileRank && problem.rows_per_entry > kMaxVectorRows)
      return PlanTiles<T>(problem, rows, rank, properties);
  return PlanVectors<T>(problem, rows, rank, properties);
}

// One launch: up to kMembers members, from the first on.
template <class T>
const char* ReflectSome(const Task& task, int64_t first, const device::Properties& properties, void* stream) {
  const int64_t left = task.count - first;
  Problem problem = Describe<T>(task, first, left < kMembers ? left : kMembers);
  const Plan plan = MakePlan<T>(problem, task.rows, properties);
  if (plan.shared_bytes > properties.shared_limit) return "the reflection's rank is too large for the CUDA kernel";
  if (plan.blocks > kMaxBlocks) return "the reflection has too many rows for one CUDA launch";
  const int64_t members = plan.blocks >= 2 * properties.multiprocessors ? 1 : problem.count;
  const device::Shape shape = {static_cast<unsigned>(plan.blocks), static_cast<unsigned>(members),
                               static_cast<unsigned>(plan.cluster), kThreads,
                               static_cast<unsigned>(plan.shared_bytes)};
  return device::Launch(plan.kernel, shape, problem, properties, stream);
}

template <class T>
const char* Reflect(const Task& task, void* stream) {
  device::Properties properties = {};
  if (const char* error = device::Query(ReflectByVectors<T, 1, true>, properties)) return error;
  if (properties.compute_major < 8) return "the reflection's CUDA kernel needs compute capability 8.0 or newer";
  for (int64_t first = 0; first < task.count; first += kMembers)
    if (const char* error = ReflectSome<T>(task, first, properties, stream)) return error;
  return nullptr;
}

}  // namespace

const char* ReflectOnCuda(const Task& task, void* stream) {
  if (task.rows == 0 || task.features == 0) return nullptr;
  switch (task.type) {
    case Type::kFloat32:
      return Reflect<float>(task, stream);
    case Type::kFloat16:
      return Reflect<Half>(task, stream);
    case Type::kBFloat16:
      return Reflect<BFloat16>(task, stream);
  }
  return "the reflection's CUDA kernel knows float32, float16 and bfloat16";
}

}  // namespace hra
