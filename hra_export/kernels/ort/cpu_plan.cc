// The numbers of pieces, and where each has its floats.

#include "cpu_plan.h"

#include <algorithm>

namespace hra::cpu {
namespace {

int64_t Pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

}  // namespace

Plan::Plan(const Task& task, const Instructions& instructions, const PackedFactors* packed)
    : task_(task), instructions_(instructions), packed_(packed) {
  const int64_t d = task.features;
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t rank = task.members[i].rank;
    Cut cut{};
    int64_t wanted = std::clamp(Pieces(d * rank * SizeOf(task.type), kUnitBytes), int64_t{1}, kMaxUnits);
    if (wanted > 1) wanted = Pieces(wanted, 2) * 2;  // as much for each of two threads
    cut.width = Pieces(Pieces(d, wanted), kPackedColumns) * kPackedColumns;
    cut.pieces = Pieces(d, cut.width);
    cut.columns = PaddedRank(rank);
    cut.depths = Pieces(d, kPanelDepth);
    cut.panel_sets = Pieces(cut.columns, kPanelColumns * kPanelSet);
    cuts_[i] = cut;
    own_scratch_ = std::max(own_scratch_, cut.columns * std::max(kFewRows, 2 * kBlockRows));
    // The sums of tiles, then T and T M.
    if (HasCoefficients(i)) {
      own_scratch_ = std::max(own_scratch_, task.rows * cut.columns * std::max<int64_t>(2, instructions.lanes));
    }
  }
}

const char* Plan::Read() {
  if (task_.index == nullptr) {
    single_ = {0, task_.rows, 0, {0, 0}, 0};
    return nullptr;
  }
  int64_t adapters = INT64_MAX;
  for (int64_t i = 0; i < task_.count; ++i) adapters = std::min(adapters, task_.members[i].adapters);
  const int64_t each = task_.rows_per_index, entries = task_.rows / each;
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t adapter = task_.index[i];
    if (adapter < 0 || adapter >= adapters) return "the index names an adapter that is not there";
    if (several_.empty() || several_.back().adapter != adapter) several_.push_back({i * each, 0, adapter, {0, 0}, 0});
    several_.back().rows += each;
  }
  segments_ = several_.data();
  count_ = several_.size();
  return nullptr;
}

size_t Plan::Number(size_t first, int64_t limit) {
  begin_ = first;
  scratch_ = units_[0] = units_[1] = 0;
  for (end_ = first; end_ < count_; ++end_) {
    Segment& segment = segments_[end_];
    int64_t floats = 0;
    for (int64_t i = 0; i < task_.count; ++i) floats += FloatsOf(segment, i);
    if (end_ > first && scratch_ + floats > limit) break;
    segment.scratch = scratch_;
    scratch_ += floats;
    for (int stage = 0; stage < 2; ++stage) {
      segment.first[stage] = units_[stage];
      for (int64_t i = 0; i < task_.count; ++i) units_[stage] += UnitsOf(stage, segment, i);
    }
  }
  return end_;
}

Unit Plan::Find(int stage, int64_t unit) const {
  const Segment *begin = segments_ + begin_, *end = segments_ + end_;
  // The last segment that starts at or before the unit; one without units starts where the next does.
  const auto after = std::upper_bound(
      begin, end, unit, [stage](int64_t wanted, const Segment& segment) { return wanted < segment.first[stage]; });
  const Segment& segment = *(after - 1);
  int64_t piece = unit - segment.first[stage], member = 0;
  while (piece >= UnitsOf(stage, segment, member)) piece -= UnitsOf(stage, segment, member++);
  return {&segment, member, piece};
}

int64_t Plan::UnitsOf(int stage, const Segment& segment, int64_t member) const {
  const Cut& cut = cuts_[member];
  if (IsFew(segment)) return stage == 0 && task_.members[member].rank == 0 ? 0 : cut.pieces;
  return stage == 0 ? cut.depths * cut.panel_sets : Pieces(segment.rows, BlockRows(segment));
}

int64_t Plan::FloatsOf(const Segment& segment, int64_t member) const {
  const Cut& cut = cuts_[member];
  if (IsFew(segment)) return cut.pieces * segment.rows * task_.members[member].rank;
  return instructions_.PaddedDepth(task_.features) * cut.columns;
}

int64_t Plan::ScratchOf(const Segment& segment, int64_t member) const {
  int64_t start = segment.scratch;
  for (int64_t i = 0; i < member; ++i) start += FloatsOf(segment, i);
  return start;
}

int64_t Plan::Work() const {
  int64_t bytes = 0;
  for (size_t s = begin_; s < end_; ++s) {
    for (int64_t i = 0; i < task_.count; ++i) {
      const int64_t factor = task_.members[i].rank * task_.features * SizeOf(task_.type);
      const int64_t factors = HasCoefficients(i) ? factor : 2 * factor;
      // A tile of rows does as much arithmetic as reading the factors once from memory takes time.
      bytes += factors * Pieces(segments_[s].rows, kBlockRows / 2) + segments_[s].rows * task_.features * 2;
    }
  }
  return bytes;
}

}  // namespace hra::cpu
