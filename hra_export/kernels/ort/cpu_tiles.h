// The kernels of `cpu_kernels.h`, once, for every set of instructions.
//
// Each file that includes this gives a class `Simd` in a namespace without a name, and is compiled for its own
// instructions. So nothing here may have a name that the linker sees, and no template of the standard library is used:
// a function that two of these files share would be kept in one of its forms, which another machine may lack.
//
// Simd: Vec, kLanes, kMultiplyRows, kTileRows, kTileVectors, Zero, Set, Add, MulAdd, PackFour, AddSums, and for each
// element type Widen, Load, Store, LoadFirst and StoreFirst (only the first `count` lanes exist).
#pragma once

#include <cstdint>

#include "cpu_kernels.h"

namespace hra::cpu {
namespace {

inline int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Most(int64_t a, int64_t b) { return a < b ? b : a; }

template <class Simd, class Element>
struct Tiles {
  using Vec = typename Simd::Vec;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kChains = 4;  // sums over k that do not wait for one another

  // ---- T = X U for few rows: vectors lie along the columns of U -------------------------------------------------

  static void Project(const Rows& rows, const void* u, int64_t rank, int64_t begin, int64_t end, float* t) {
    const auto* from = static_cast<const Element*>(u);
    const int64_t depth = Most(kChains, kBlockBytes / (rank * int64_t{sizeof(Element)}));
    for (int64_t i = 0; i < rows.count * rank; ++i) t[i] = 0;
    for (int64_t k = begin; k < end; k += depth) {
      const int64_t stop = Least(end, k + depth);
      // Beyond `end` too: what follows is the next piece's.
      Prefetch(from + stop * rank, Least(rows.features - stop, depth) * rank * int64_t{sizeof(Element)});
      int64_t row = 0;
      for (; row + 2 <= rows.count; row += 2) ProjectRows<2>(rows, row, from, rank, k, stop, t);
      if (row < rows.count) ProjectRows<1>(rows, row, from, rank, k, stop, t);
    }
  }

  template <int R>
  static void ProjectRows(const Rows& rows, int64_t row, const Element* u, int64_t rank, int64_t begin, int64_t end,
                          float* t) {
    const Element* x = static_cast<const Element*>(rows.x) + row * rows.features;
    int64_t column = 0;
    for (; column + kLanes <= rank; column += kLanes) {
      ProjectColumns<R, true>(x, rows.features, u + column, rank, begin, end, t + row * rank + column, kLanes);
    }
    if (column < rank) {
      ProjectColumns<R, false>(x, rows.features, u + column, rank, begin, end, t + row * rank + column,
                               static_cast<int>(rank - column));
    }
  }

  template <bool kFull, class Any>
  static Vec LoadColumns(const Any* from, int columns) {
    return kFull ? Simd::Load(from) : Simd::LoadFirst(from, columns);
  }

  template <int R, bool kFull>
  static void ProjectColumns(const Element* x, int64_t d, const Element* u, int64_t rank, int64_t begin, int64_t end,
                             float* t, int columns) {
    Vec sums[kChains][R];
    for (auto& chain : sums)
      for (auto& sum : chain) sum = Simd::Zero();
    int64_t k = begin;
    for (; k + kChains <= end; k += kChains) {
      for (int c = 0; c < kChains; ++c) {
        const Vec from = LoadColumns<kFull>(u + (k + c) * rank, columns);
        for (int i = 0; i < R; ++i) {
          sums[c][i] = Simd::MulAdd(Simd::Set(Simd::Widen(x[i * d + k + c])), from, sums[c][i]);
        }
      }
    }
    for (; k < end; ++k) {
      const Vec from = LoadColumns<kFull>(u + k * rank, columns);
      for (int i = 0; i < R; ++i) sums[0][i] = Simd::MulAdd(Simd::Set(Simd::Widen(x[i * d + k])), from, sums[0][i]);
    }
    for (int i = 0; i < R; ++i) {
      const Vec sum = Simd::Add(Simd::Add(sums[0][i], sums[1][i]), Simd::Add(sums[2][i], sums[3][i]));
      float* to = t + i * rank;
      const Vec total = Simd::Add(LoadColumns<kFull>(to, columns), sum);
      kFull ? Simd::Store(to, total) : Simd::StoreFirst(to, total, columns);
    }
  }

  // ---- The same of tiles of Uᵀ: vectors lie along d -------------------------------------------------------------

  // Sums are in memory, in L1 for few rows at usual ranks, so that any rank is read as one stream.
  static void ProjectTiles(const Rows& rows, const void* tiles, int64_t rank, int64_t begin, int64_t end, float* sums,
                           float* t) {
    const int64_t row_sums = PaddedRank(rank) * kLanes;
    for (int64_t i = 0; i < rows.count * row_sums; ++i) sums[i] = 0;
    const auto* tile = static_cast<const Element*>(tiles);
    for (int64_t k = begin; k < end; k += kPackedColumns) {
      const int64_t width = Least(kPackedColumns, end - k);
      // Beyond `end` too: what follows is the next piece's.
      Prefetch(reinterpret_cast<const char*>(tile) + kBlockBytes, width * rank * int64_t{sizeof(Element)});
      for (int64_t i = 0; i < rows.count; ++i) {
        const Element* x = static_cast<const Element*>(rows.x) + i * rows.features + k;
        AddTile(x, tile, rank, width, sums + i * row_sums);
      }
      tile += width * rank;
    }
    for (int64_t i = 0; i < rows.count; ++i, sums += row_sums, t += rank) Total(sums, rank, t);
  }

  // sums[j] += x ∘ tile[j]
  static void AddTile(const Element* x, const Element* tile, int64_t rank, int64_t width, float* sums) {
    constexpr int64_t kWide = Simd::kTileVectors * kLanes;
    int64_t column = 0;
    for (; column + kWide <= width; column += kWide) {
      AddColumns<Simd::kTileVectors, true>(x + column, tile + column, rank, width, sums, kLanes);
    }
    for (; column + kLanes <= width; column += kLanes) {
      AddColumns<1, true>(x + column, tile + column, rank, width, sums, kLanes);
    }
    if (column < width) {
      AddColumns<1, false>(x + column, tile + column, rank, width, sums, static_cast<int>(width - column));
    }
  }

  template <int kVectors, bool kFull>
  static void AddColumns(const Element* x, const Element* tile, int64_t rank, int64_t width, float* sums,
                         int columns) {
    Vec from[kVectors];
    for (int c = 0; c < kVectors; ++c) from[c] = LoadColumns<kFull>(x + c * kLanes, columns);
    for (int64_t j = 0; j < rank; ++j, tile += width, sums += kLanes) {
      Vec sum = Simd::Load(sums);
      for (int c = 0; c < kVectors; ++c) {
        sum = Simd::MulAdd(from[c], LoadColumns<kFull>(tile + c * kLanes, columns), sum);
      }
      Simd::Store(sums, sum);
    }
  }

  // t[j] = the sum of the lanes of sums[j]
  static void Total(const float* sums, int64_t rank, float* t) {
    for (int64_t j = 0; j < rank; j += kPanelColumns, sums += kPanelColumns * kLanes) {
      Vec lanes[kPanelColumns];
      for (int64_t c = 0; c < kPanelColumns; ++c) lanes[c] = Simd::Load(sums + c * kLanes);
      float totals[kPanelColumns] = {};
      Simd::AddSums(lanes, totals);
      for (int64_t c = 0; c < Least(kPanelColumns, rank - j); ++c) t[j + c] = totals[c];
    }
  }

  // ---- T += X panel for many rows: vectors lie along d -----------------------------------------------------------

  static void Pack(const void* u, int64_t rank, int64_t begin, int64_t end, int64_t column, float* panel) {
    const auto* from = static_cast<const Element*>(u) + column;
    const int64_t columns = Least(kPanelColumns, rank - column);
    for (int64_t k = begin; k < end; k += kLanes, panel += kPanelColumns * kLanes) {
      if (columns == kPanelColumns && k + kLanes <= end) {
        Simd::PackFour(from + k * rank, rank, panel);
        continue;
      }
      for (int64_t c = 0; c < kPanelColumns; ++c)
        for (int64_t l = 0; l < kLanes; ++l)
          panel[c * kLanes + l] = c < columns && k + l < end ? Simd::Widen(from[(k + l) * rank + c]) : 0.0f;
    }
  }

  static void Multiply(const Rows& rows, const float* panel, int64_t begin, int64_t end, float* t, int64_t stride) {
    constexpr int kRows = Simd::kMultiplyRows;
    const Element* x = static_cast<const Element*>(rows.x) + begin;
    int64_t row = 0;
    for (; row + kRows <= rows.count; row += kRows) {
      MultiplyTile<kRows>(x + row * rows.features, rows.features, panel, end - begin, t + row * stride, stride);
    }
    for (; row < rows.count; ++row) {
      MultiplyTile<1>(x + row * rows.features, rows.features, panel, end - begin, t + row * stride, stride);
    }
  }

  template <int R>
  static void MultiplyTile(const Element* x, int64_t d, const float* panel, int64_t depth, float* t, int64_t stride) {
    Vec sums[R][kPanelColumns];
    for (auto& row : sums)
      for (auto& sum : row) sum = Simd::Zero();
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes, panel += kPanelColumns * kLanes) {
      Vec from[R];
      for (int i = 0; i < R; ++i) from[i] = Simd::Load(x + i * d + k);
      for (int c = 0; c < kPanelColumns; ++c) {
        const Vec column = Simd::Load(panel + c * kLanes);
        for (int i = 0; i < R; ++i) sums[i][c] = Simd::MulAdd(from[i], column, sums[i][c]);
      }
    }
    if (k < depth) {
      for (int i = 0; i < R; ++i) {
        const Vec from = Simd::LoadFirst(x + i * d + k, static_cast<int>(depth - k));
        for (int c = 0; c < kPanelColumns; ++c)
          sums[i][c] = Simd::MulAdd(from, Simd::Load(panel + c * kLanes), sums[i][c]);
      }
    }
    for (int i = 0; i < R; ++i) Simd::AddSums(sums[i], t + i * stride);
  }

  // ---- Y = X + T V: vectors lie along d --------------------------------------------------------------------------

  struct Target {
    const Element* x;
    const float* t;
    int64_t stride;  // of t
    const Element* v;  // of column `begin`
    int64_t width;     // from row to row of V
    int64_t rank;
    Element* y;
    int64_t features;
    int64_t begin;

    Target Down(int64_t rows) const {
      return {x + rows * features, t + rows * stride, stride, v, width, rank, y + rows * features, features, begin};
    }
  };

  // Rows within blocks of columns, not columns within rows: what is written is a page at a time (a quarter of one, and
  // memory writes ten times slower), and V of a block stays in L1 at usual ranks.
  static void Update(const Rows& rows, const float* t, int64_t stride, const void* v, int64_t width, int64_t rank,
                     int64_t begin, int64_t end, void* y) {
    const Target target{static_cast<const Element*>(rows.x), t, stride, static_cast<const Element*>(v), width, rank,
                        static_cast<Element*>(y), rows.features, begin};
    constexpr int kRows = Simd::kTileRows;
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t last = Least(end, first + kColumns);
      // With few rows, V comes from memory: the first of them ask for the columns that come next.
      const int64_t wanted = rows.count <= kRows ? Least(rows.features, begin + width) : 0;
      int64_t row = 0;
      for (; row + kRows <= rows.count; row += kRows) UpdateRows<kRows>(target.Down(row), first, last, wanted);
      for (; row + 2 <= rows.count; row += 2) UpdateRows<2>(target.Down(row), first, last, row == 0 ? wanted : 0);
      if (row < rows.count) UpdateRows<1>(target.Down(row), first, last, row == 0 ? wanted : 0);
    }
  }

  static constexpr int64_t kColumns = 1024;

  // Y[0:R, begin:end]; V's columns before `wanted` are asked for ahead of time.
  template <int R>
  static void UpdateRows(const Target& target, int64_t begin, int64_t end, int64_t wanted) {
    constexpr int64_t kWide = Simd::kTileVectors * kLanes, kSize = sizeof(Element);
    const int64_t ahead = Most(kWide, kBlockBytes / Most(kSize, target.rank * kSize) / kWide * kWide);
    int64_t column = begin;
    for (; column + kWide <= end; column += kWide) {
      if (column + ahead < wanted) {
        const int64_t bytes = Least(kWide, wanted - column - ahead) * kSize;
        const Element* next = target.v + column - target.begin + ahead;
        for (int64_t j = 0; j < target.rank; ++j) Prefetch(next + j * target.width, bytes);
      }
      UpdateTile<R, Simd::kTileVectors, true>(target, column, kLanes);
    }
    for (; column + kLanes <= end; column += kLanes) UpdateTile<R, 1, true>(target, column, kLanes);
    if (column < end) UpdateTile<R, 1, false>(target, column, static_cast<int>(end - column));
  }

  template <int R, int kVectors, bool kFull>
  static void UpdateTile(const Target& target, int64_t column, int columns) {
    Vec sums[R][kVectors];
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < kVectors; ++c)
        sums[i][c] = LoadColumns<kFull>(target.x + i * target.features + column + c * kLanes, columns);
    for (int64_t j = 0; j < target.rank; ++j) {
      const Element* from = target.v + j * target.width + column - target.begin;
      Vec v[kVectors];
      for (int c = 0; c < kVectors; ++c) v[c] = LoadColumns<kFull>(from + c * kLanes, columns);
      for (int i = 0; i < R; ++i) {
        const Vec t = Simd::Set(target.t[i * target.stride + j]);
        for (int c = 0; c < kVectors; ++c) sums[i][c] = Simd::MulAdd(t, v[c], sums[i][c]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < kVectors; ++c) {
        Element* to = target.y + i * target.features + column + c * kLanes;
        kFull ? Simd::Store(to, sums[i][c]) : Simd::StoreFirst(to, sums[i][c], columns);
      }
  }

  static constexpr Kernels Table() { return {Project, ProjectTiles, Pack, Multiply, Update}; }
};

}  // namespace
}  // namespace hra::cpu
