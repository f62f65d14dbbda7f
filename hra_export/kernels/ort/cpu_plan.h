// How a task is cut into units of work for several threads.
//
// Rows that follow one another and have the same adapter are a segment. In two stages, with everybody waiting between,
//
//                 stage 1                                         stage 2
//   few rows      a piece of d: partial sums of X U               the same columns: T, then those of Y = X + T V
//                                                                 or X + (T M) Uᵀ
//   many rows     U of some columns and rows, transposed          some rows: T = X U, then Y = X + T V
//
// are run for every segment and member of the group. With few rows U and V are read once, from memory, and that is the
// time it takes (with M it is U alone, and stage 2 finds it in the cache); with many it is arithmetic. The cut depends
// on shapes only, never on threads: so do all results, to the bit.
//
// Letters: d features, r rank, n rows of X.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cpu_kernels.h"
#include "cpu_packing.h"
#include "task.h"

namespace hra::cpu {

struct Segment {
  int64_t row, rows, adapter;
  int64_t first[2];   // its units in the stages
  int64_t scratch;    // where its floats start
};

// The pieces of one member, the same in every segment.
struct Cut {
  int64_t pieces, width;       // few rows: of d
  int64_t columns;             // r, padded to whole panels
  int64_t depths, panel_sets;  // many rows, stage 1
};

// What one thread does at a time: a member and its piece.
struct Unit {
  const Segment* segment;
  int64_t member, piece;
};

class Plan {
 public:
  // `packed` may be null.
  Plan(const Task& task, const Instructions& instructions, const PackedFactors* packed);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // All of the task's segments; null or what is wrong with the index.
  const char* Read();

  // Numbers the units of the segments from `first` on, as many segments as share `limit` floats of scratch (always one,
  // whatever it takes). Returns the segment after the last.
  size_t Number(size_t first, int64_t limit);

  int64_t Units(int stage) const { return units_[stage]; }
  Unit Find(int stage, int64_t unit) const;

  bool IsFew(const Segment& segment) const { return segment.rows <= kFewRows; }
  const Cut& Of(int64_t member) const { return cuts_[member]; }
  size_t Segments() const { return count_; }

  int64_t Scratch() const { return scratch_; }            // floats of the numbered segments
  int64_t OwnScratch() const { return own_scratch_; }     // floats that each thread needs beside
  int64_t ScratchOf(const Segment& segment, int64_t member) const;  // where the member's floats start
  int64_t Work() const;                                   // bytes to read, about

  // Rows of a block with many rows.
  static int64_t BlockRows(const Segment& segment) {
    return segment.rows < 32 * kBlockRows ? kBlockRows : 2 * kBlockRows;
  }

  static constexpr int64_t kBlockRows = 12;        // a multiple of every kernel's tile
  static constexpr int64_t kUnitBytes = 48 << 10;  // of U or V in a unit, at most, unless there were too many units
  static constexpr int64_t kMaxUnits = 32;         // of a member in a stage, with few rows
  static constexpr int64_t kPanelSet = 4;          // panels in a unit

 private:
  int64_t UnitsOf(int stage, const Segment& segment, int64_t member) const;
  int64_t FloatsOf(const Segment& segment, int64_t member) const;
  bool HasCoefficients(int64_t member) const { return packed_ != nullptr && packed_->members[member].m != nullptr; }

  const Task& task_;
  const Instructions& instructions_;
  const PackedFactors* const packed_;
  std::array<Cut, kMaxMembers> cuts_;
  // Without an index there is one segment, and no memory to ask for.
  Segment single_;
  std::vector<Segment> several_;
  Segment* segments_ = &single_;
  size_t count_ = 1, begin_ = 0, end_ = 0;
  int64_t units_[2] = {0, 0};
  int64_t scratch_ = 0, own_scratch_ = 0;
};

}  // namespace hra::cpu
