// The kernel without tensor cores: a few rows a block, every type, any rank. Why it is so: cuda_reflection.cu.
//
// A block has up to kRows rows and one slice of the columns. Each thread holds 16 bytes of U's columns and walks down
// the rows of U; what they sum is added over the block in shared memory and, with clusters, over the slices: then each
// block has all of X U, and makes its own columns of Y. Without clusters a block sums over all of d, each for itself.
#pragma once

#include "cuda_problem.cuh"

namespace hra {
namespace device {

// How many columns of U a thread holds.
template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

// How many ranks are summed in one pass: one warp then spans them.
template <class T>
constexpr int kPass = kLanes * kWidth<T>;

// Bytes of shared memory: every thread's sums, then X U of the block; and with clusters X U of them all, and a slot for
// that of each.
template <class T>
constexpr int64_t VectorBytes(int64_t rows, int64_t rank, int cluster) {
  return rows * (kWidth<T> * kThreads + (cluster > 0 ? 2 + cluster : 1) * rank) * static_cast<int64_t>(sizeof(float));
}

// `count` elements of a row, and zeros behind them.
template <class T>
__device__ __forceinline__ void LoadWide(const T* from, int count, bool wide, float (&values)[kWidth<T>]) {
  if (wide) {
    const auto loaded = *reinterpret_cast<const Neighbours<T, kWidth<T>>*>(from);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) values[i] = ToFloat(loaded.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) values[i] = i < count ? ToFloat(from[i]) : 0.0f;
  }
}

// Adds what the threads hold and writes sums[row, rank0 …]. Threads whose number is alike modulo `groups`, a power of
// two up to 32, hold the same columns.
template <class T, int kRows>
__device__ __forceinline__ void SumOverBlock(const float (&held)[kRows][kWidth<T>], int groups, int64_t rank0,
                                             int64_t rank, float* partial, float* sums) {
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) partial[(row * kWidth<T> + i) * kThreads + Thread()] = held[row][i];
  SyncBlock();
  const int lane = Thread() % kLanes;
  for (int place = Thread() / kLanes; place < kRows * kWidth<T>; place += kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += partial[place * kThreads + i * kLanes + lane];
    for (int mask = kLanes / 2; mask >= groups; mask /= 2) sum += ShuffleXor(sum, mask);
    const int64_t column = rank0 + lane * kWidth<T> + place % kWidth<T>;
    if (lane < groups && column < rank) sums[place / kWidth<T> * rank + column] = sum;
  }
  SyncBlock();
}

// sums[row, …] = x[row, begin … end] u[begin … end, …] for the rows of the place.
template <class T, int kRows>
__device__ __forceinline__ void Project(const T* x, const T* u, int64_t features, int64_t rank, int rows, int64_t begin,
                                        int64_t end, bool wide, float* partial, float* sums) {
  const T* row_of[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) row_of[row] = x + Min(row, rows - 1) * features;  // spare rows repeat the last
  for (int64_t rank0 = 0; rank0 < rank; rank0 += kPass<T>) {
    int groups = 1;
    while (groups < kLanes && groups * kWidth<T> < rank - rank0) groups *= 2;
    const int64_t column = rank0 + Thread() % groups * kWidth<T>;
    const int width = static_cast<int>(Max(Min(rank - column, kWidth<T>), 0));
    float held[kRows][kWidth<T>] = {};
    if (width > 0) {
#pragma unroll 4
      for (int64_t k = begin + Thread() / groups; k < end; k += kThreads / groups) {
        float values[kWidth<T>];
        LoadWide(u + k * rank + column, width, wide, values);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const float factor = ToFloat(row_of[row][k]);
#pragma unroll
          for (int i = 0; i < kWidth<T>; ++i) held[row][i] += factor * values[i];
        }
      }
    }
    SumOverBlock<T, kRows>(held, groups, rank0, rank, partial, sums);
  }
}

// all = the sums of every block of the cluster, in the order of their slices. Each block writes its own into a slot of
// every other, which costs one way where reading them would cost two. The cluster's barrier alternates between "the
// slots may be written", which all have said before this is called and say again at its end, and "they are written".
template <int kRows>
__device__ __forceinline__ void SumOverCluster(const float* sums, float* slots, float* all, int64_t rank, int slices,
                                               int slice) {
  const int64_t count = kRows * rank;
  WaitCluster();
  for (int64_t i = Thread(); i < count; i += kThreads) {
    const float sum = sums[i];
#pragma unroll
    for (int peer = 0; peer < kMaxSlices; ++peer)
      if (peer < slices) Peer(slots + slice * count, peer)[i] = sum;
  }
  ArriveCluster();
  WaitCluster();
  for (int64_t i = Thread(); i < count; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int peer = 0; peer < kMaxSlices; ++peer)
      if (peer < slices) sum += slots[peer * count + i];
    all[i] = sum;
  }
  ArriveCluster();
  SyncBlock();
}

// y = x + sum at `width` neighbouring elements. One by one: in pairs, X and Y would have to be aligned as V is.
template <class T, int kColumns>
__device__ __forceinline__ void AddAndStore(const T* x, const float (&sum)[kColumns], T* y, int64_t at, int width) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (i < width) y[at + i] = FromFloat<T>(ToFloat(x[at + i]) + sum[i]);
}

// y = x + xu v for the place's rows and columns; a thread makes four bytes' worth of columns at a time.
template <class T, int kRows>
__device__ __forceinline__ void Expand(const T* x, const float* xu, const T* v, T* y, int64_t features, int64_t rank,
                                       const Place& place, bool pairs) {
  constexpr int kColumns = 4 / static_cast<int>(sizeof(T));
  using Columns = Neighbours<T, kColumns>;
  for (int64_t column = place.begin + Thread() * kColumns; column < place.end; column += kThreads * kColumns) {
    const int width = static_cast<int>(Min(kColumns, place.end - column));
    float sum[kRows][kColumns] = {};
#pragma unroll 8
    for (int64_t j = 0; j < rank; ++j) {
      Columns row_of_v = {};
      const T* from = v + j * features + column;
      if (pairs) {
        row_of_v = *reinterpret_cast<const Columns*>(from);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          if (i < width) row_of_v.element[i] = from[i];
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sum[row][i] += xu[row * rank + j] * ToFloat(row_of_v.element[i]);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      if (row < place.rows) AddAndStore<T, kColumns>(x, sum[row], y, (place.row + row) * features + column, width);
  }
}

}  // namespace device

// Blocks: x slices × tiles, y members. Threads: kThreads. Shared memory: VectorBytes of the largest rank.
template <class T, int kRows, bool kCluster>
__global__ void __launch_bounds__(kThreads, 1) ReflectByVectors(const Problem problem) {
  using namespace device;
  const Place place = FindPlace(problem);
  const T* x = static_cast<const T*>(problem.x);
  const int64_t d = problem.features;
  if (kCluster) ArriveCluster();
  for (int i = static_cast<int>(BlockY()); i < problem.count; i += static_cast<int>(BlocksY())) {
    const Member& member = problem.members[i];
    const int64_t rank = member.rank;
    T* y = static_cast<T*>(member.y);
    if (place.adapter < 0 || place.adapter >= member.adapters) {
      FillWithNan(y, place, d);
      continue;
    }
    const T* u = static_cast<const T*>(member.u) + place.adapter * d * rank;
    const T* v = static_cast<const T*>(member.v) + place.adapter * d * rank;
    PrefetchColumns(v, d, rank, place);
    float* partial = reinterpret_cast<float*>(Shared());
    float* sums = partial + kRows * kWidth<T> * kThreads;
    // Where no member's slots are, whatever its rank: other blocks may be writing the next member's while Y is made.
    float* all = kCluster ? sums + kRows * problem.largest_rank : sums;
    const int64_t begin = kCluster ? place.begin : 0;
    const int64_t end = kCluster ? place.end : d;
    Project<T, kRows>(x + place.row * d, u, d, rank, place.rows, begin, end, problem.u_wide[i], partial, sums);
    float* slots = all + kRows * problem.largest_rank;
    if (kCluster) SumOverCluster<kRows>(sums, slots, all, rank, problem.slices, place.slice);
    Expand<T, kRows>(x, all, v, y, d, rank, place, problem.v_pairs[i]);
  }
  if (kCluster) WaitCluster();
}

}  // namespace hra
