// What both kernels are given, and which part of it a block works on.
#pragma once

#include "cuda_device.cuh"
#include "task.h"

namespace hra {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr int kMembers = 8;    // the most in one launch
constexpr int kMaxSlices = 8;  // the largest cluster that every device with clusters takes

// A kernel's whole argument. The rows are cut into tiles that share one entry of the index, the features into slices;
// blocks along x go through the slices of a tile, then through the tiles; blocks along y share the members.
struct Problem {
  const void* x;         // (n, d)
  const int64_t* index;  // (entries,) or null
  int64_t features;      // d
  int64_t largest_rank;  // of the members
  int64_t rows_per_entry;
  int64_t tiles_per_entry;
  int tile_rows;
  int slices;
  int slice_width;  // a multiple of 16; the last slice may be narrower, or empty
  int count;
  bool x_quads;           // four elements of X, and of every Y, can be moved at once wherever four columns begin
  bool u_wide[kMembers];  // 16 bytes of U can be read at once, wherever that many columns begin
  bool u_pairs[kMembers];
  bool v_pairs[kMembers];  // two elements of V can be read at once at even columns
  Member members[kMembers];
};

namespace device {

constexpr __device__ __forceinline__ int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr __device__ __forceinline__ int64_t Max(int64_t a, int64_t b) { return a < b ? b : a; }

// Elements that are moved in one instruction, at an address that is a multiple of their size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Neighbours {
  T element[kCount];
};

// One block's rows and columns.
struct Place {
  int64_t row;  // the first row of X
  int rows;
  int64_t adapter;  // from the index; 0 without one
  int slice;
  int64_t begin;  // columns begin … end − 1
  int64_t end;
};

__device__ __forceinline__ Place FindPlace(const Problem& problem) {
  const int64_t tile = BlockX() / static_cast<unsigned>(problem.slices);
  const int64_t entry = tile / problem.tiles_per_entry;
  const int64_t first = tile % problem.tiles_per_entry * problem.tile_rows;  // within the entry
  Place place;
  place.row = entry * problem.rows_per_entry + first;
  place.rows = static_cast<int>(Min(problem.tile_rows, problem.rows_per_entry - first));
  place.adapter = problem.index == nullptr ? 0 : problem.index[entry];
  place.slice = static_cast<int>(BlockX() % static_cast<unsigned>(problem.slices));
  place.begin = Min(int64_t{place.slice} * problem.slice_width, problem.features);
  place.end = Min(place.begin + problem.slice_width, problem.features);
  return place;
}

// What a row becomes whose index names no adapter.
template <class T>
__device__ __forceinline__ void FillWithNan(T* y, const Place& place, int64_t features) {
  const T nan = FromFloat<T>(__builtin_nanf(""));
  for (int row = 0; row < place.rows; ++row)
    for (int64_t column = place.begin + Thread(); column < place.end; column += kThreads)
      y[(place.row + row) * features + column] = nan;
}

// Starts to bring the block's columns of V into the L2 cache, which needs nothing of what comes before.
template <class T>
__device__ __forceinline__ void PrefetchColumns(const T* v, int64_t features, int64_t rank, const Place& place) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(T));
  const int64_t lines = (place.end - place.begin + kLine - 1) / kLine;
  for (int64_t i = Thread(); i < rank * lines; i += kThreads)
    Prefetch(v + i / lines * features + place.begin + i % lines * kLine);
}

}  // namespace device
}  // namespace hra
