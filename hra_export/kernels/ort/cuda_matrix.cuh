// The kernel on the tensor cores: float16 and bfloat16, ranks up to 128, from 5 rows on. Why it is so:
// cuda_reflection.cu.
//
#pragma once

#include "cuda_problem.cuh"
#include "cuda_tile.cuh"

namespace hra {
namespace device {

// Bytes of shared memory: the sums of half the warps, then X U of the block as left operands, high and low.
constexpr int64_t MatrixBytes(int row_tiles, int rank_tiles) {
  return int64_t{row_tiles} * rank_tiles * kLanes * (kWarps / 2 * 2 * sizeof(Quad) + 2 * sizeof(LeftWords));
}

// How many tiles of rows and of ranks the block really has; the rest of the register arrays is left alone.
struct Extent {
  int row_tiles;
  int rank_tiles;
};

// sums += X U over every kWarps-th tile of the columns begin … end.
template <class T, int kRowTiles, int kRankTiles>
__device__ __forceinline__ void ProjectTiles(const T* x, const T* u, const Problem& problem, int member,
                                             const Place& place, int64_t begin, int64_t end, Extent extent,
                                             Result (&sums)[kRowTiles][kRankTiles]) {
  const int64_t rank = problem.members[member].rank;
  for (int64_t k = begin + Thread() / kLanes * kTile; k < end; k += kWarps * kTile) {
    Left left[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      if (i < extent.row_tiles)
        left[i] = LoadLeft(x + i * kTile * problem.features + k, problem.features, place.rows - i * kTile, end - k,
                           problem.x_quads);
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
      if (j >= extent.rank_tiles) break;
      const Right right = LoadRight(u + k * rank + j * kTile, rank, end - k, rank - j * kTile, problem.u_pairs[member]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        if (i < extent.row_tiles) Multiply<T>(sums[i][j], left[i], right);
    }
  }
}

// Writes the block's sums to buffer[tile, half, lane], each pair of warps added by the first, then each pair of pairs.
template <int kRowTiles, int kRankTiles>
__device__ __forceinline__ void SumOverWarps(Result (&sums)[kRowTiles][kRankTiles], Extent extent, Quad* buffer) {
  const int warp = Thread() / kLanes;
  const int lane = Thread() % kLanes;
  const auto each = [&](int of, auto&& action) {
    Quad* mine = buffer + of * extent.row_tiles * extent.rank_tiles * 2 * kLanes + lane;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kRankTiles; ++j)
        if (i < extent.row_tiles && j < extent.rank_tiles)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            action(sums[i][j], half, mine[((i * extent.rank_tiles + j) * 2 + half) * kLanes]);
  };
  const auto write = [](const Result& result, int half, Quad& quad) { quad = RowOf(result, half); };
  const auto add = [](Result& result, int half, const Quad& quad) { AddToRow(result, half, quad); };
  for (int givers = kWarps / 2; givers > 0; givers /= 2) {
    if (warp >= givers && warp < 2 * givers) each(warp - givers, write);
    SyncBlock();
    if (warp < givers) each(warp, add);
    SyncBlock();
  }
  if (warp == 0) each(0, write);
  SyncBlock();
}

// What stands at one place of every block of the cluster, added in their order; all are read before the first is used.
__device__ __forceinline__ Quad SumOverPeers(Quad* mine, int peers) {
  Quad theirs[kMaxSlices] = {};
#pragma unroll
  for (int peer = 0; peer < kMaxSlices; ++peer)
    if (peer < peers) theirs[peer] = *Peer(mine, peer);
  Quad sum = {};
#pragma unroll
  for (int peer = 0; peer < kMaxSlices; ++peer)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.element[i] += theirs[peer].element[i];
  return sum;
}

// operands[tile, high or low, lane] = X U, summed over the slices. The blocks of a cluster each sum a share of it, and
// give it to all.
template <class T, bool kCluster>
__device__ __forceinline__ void MakeOperands(Quad* buffer, LeftWords* operands, int slices, int slice, Extent extent,
                                             int64_t rank) {
  const int peers = kCluster ? slices : 1;
  const int units = extent.row_tiles * extent.rank_tiles * kLanes;
  if (kCluster) {
    ArriveCluster();
    WaitCluster();
  }
  for (int unit = (kCluster ? slice * kThreads : 0) + Thread(); unit < units; unit += peers * kThreads) {
    const int tile = unit / kLanes;
    const int lane = unit % kLanes;
    const int64_t column = tile % extent.rank_tiles * kTile + lane % 4 * 4;
    uint16_t high[2][4];
    uint16_t low[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Quad* mine = buffer + (tile * 2 + half) * kLanes + lane;
      Quad sum = kCluster ? SumOverPeers(mine, peers) : *mine;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + i >= rank) sum.element[i] = 0.0f;  // an infinite X times a zero beyond U is not zero
      Split<T>(sum, high[half], low[half]);
    }
    const auto words = [](const uint16_t(&of)[2][4]) -> LeftWords {
      return {{Pack(of[0][0], of[0][1]), Pack(of[1][0], of[1][1]), Pack(of[0][2], of[0][3]), Pack(of[1][2], of[1][3])}};
    };
    LeftWords* to = operands + tile * 2 * kLanes + lane;
    for (int peer = 0; peer < peers; ++peer) {
      LeftWords* theirs = kCluster ? Peer(to, peer) : to;
      theirs[0] = words(high);
      theirs[kLanes] = words(low);
    }
  }
  if (kCluster) {
    ArriveCluster();
    WaitCluster();
  } else {
    SyncBlock();
  }
}

// y = x + (X U) v for the place's rows and columns, a tile of columns a warp at a time.
template <class T, int kRowTiles, int kRankTiles>
__device__ __forceinline__ void ExpandTiles(const T* x, const LeftWords* operands, const T* v, T* y,
                                            const Problem& problem, int member, const Place& place, Extent extent) {
  const int64_t d = problem.features;
  const int64_t rank = problem.members[member].rank;
  const int lane = Thread() % kLanes;
  for (int64_t column = place.begin + Thread() / kLanes * kTile; column < place.end; column += kWarps * kTile) {
    const int64_t left_over = place.end - column;
    Left left[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      if (i < extent.row_tiles)
        left[i] = LoadLeft(x + i * kTile * d + column, d, place.rows - i * kTile, left_over, problem.x_quads);
    Result sums[kRowTiles] = {};
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
      if (j >= extent.rank_tiles) break;
      const T* from = v + j * kTile * d + column;
      const Right right = LoadRight(from, d, rank - j * kTile, left_over, problem.v_pairs[member]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if (i >= extent.row_tiles) break;
#pragma unroll
        for (int low = 0; low < 2; ++low) {
          const LeftWords words = operands[((i * extent.rank_tiles + j) * 2 + low) * kLanes + lane];
          const Left operand = {{words.element[0], words.element[1], words.element[2], words.element[3]}};
          Multiply<T>(sums[i], operand, right);
        }
      }
    }
    const int within = lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i * kTile + half * 8 + lane / 4;
        if (row < place.rows && within < left_over)
          StoreFour(left[i].word[half], left[i].word[half + 2], RowOf(sums[i], half), y + row * d + column + within,
                    left_over - within, problem.x_quads);
      }
  }
}

}  // namespace device

// Blocks: x slices × tiles of up to 16 kRowTiles rows, y members. Threads: kThreads. No rank over 16 kRankTiles.
// Shared memory: MatrixBytes of the tiles that a tile of rows and the largest rank need. Registers for two blocks on a
// multiprocessor where the sums leave room for them.
template <class T, int kRowTiles, int kRankTiles, bool kCluster>
__global__ void __launch_bounds__(kThreads, kRowTiles* kRankTiles <= 4 ? 2 : 1)
    ReflectByTiles(const Problem problem) {
  using namespace device;
  const Place place = FindPlace(problem);
  const int64_t d = problem.features;
  const T* x = static_cast<const T*>(problem.x) + place.row * d;
  for (int i = static_cast<int>(BlockY()); i < problem.count; i += static_cast<int>(BlocksY())) {
    const Member& member = problem.members[i];
    if (place.adapter < 0 || place.adapter >= member.adapters) {
      FillWithNan(static_cast<T*>(member.y), place, d);
      continue;
    }
    const T* u = static_cast<const T*>(member.u) + place.adapter * d * member.rank;
    const T* v = static_cast<const T*>(member.v) + place.adapter * d * member.rank;
    PrefetchColumns(v, d, member.rank, place);
    const Extent extent = {(place.rows + kTile - 1) / kTile, static_cast<int>((member.rank + kTile - 1) / kTile)};
    const int tiles = extent.row_tiles * extent.rank_tiles;
    Quad* buffer = reinterpret_cast<Quad*>(Shared());
    LeftWords* operands = reinterpret_cast<LeftWords*>(buffer + kWarps / 2 * tiles * 2 * kLanes);
    Result sums[kRowTiles][kRankTiles] = {};
    ProjectTiles<T, kRowTiles, kRankTiles>(x, u, problem, i, place, kCluster ? place.begin : 0,
                                           kCluster ? place.end : d, extent, sums);
    SumOverWarps(sums, extent, buffer);
    MakeOperands<T, kCluster>(buffer, operands, problem.slices, place.slice, extent, member.rank);
    T* y = static_cast<T*>(member.y) + place.row * d;
    ExpandTiles<T, kRowTiles, kRankTiles>(x, operands, v, y, problem, i, place, extent);
    SyncBlock();  // the next member's sums may lie where this one's operands are
  }
}

}  // namespace hra
