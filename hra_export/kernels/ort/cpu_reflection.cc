// The units of a plan, run by whatever threads there are.
//
// Each thread takes units of stage 1 until there are none, waits for those that others still have, and goes on with
// stage 2: one call of `Parallel`. A unit that has been taken is being run, so that nobody waits for a thread that has
// not started; all works with a single thread as well. Units stand in queues, and a thread begins with the same queue
// in both stages: with few rows, what it has read in the first is still in its own cache.

#include "cpu_reflection.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>

#include "cpu_instructions.h"
#include "cpu_packing.h"
#include "cpu_plan.h"

namespace hra {
namespace {

using cpu::Cut;
using cpu::Instructions;
using cpu::Kernels;
using cpu::PackedFactors;
using cpu::PackedMember;
using cpu::Plan;
using cpu::Rows;
using cpu::Segment;
using cpu::Unit;

constexpr int64_t kScratchLimit = 16 << 20;    // floats for the segments that share a call of `Parallel`
constexpr int64_t kWorthAThread = 96 << 10;    // bytes: what is read in the time that a thread needs to come and go
constexpr int64_t kQueues = 8;                 // at most; more threads share them
constexpr size_t kCacheLine = 64;

// Floats that start at a cache line; small ones are in the object itself.
class Scratch {
 public:
  bool Reserve(int64_t floats) {
    if (floats <= kInside) return true;
    size_t bytes = static_cast<size_t>(floats) * sizeof(float), space = bytes + kCacheLine;
    memory_.reset(new (std::nothrow) unsigned char[space]);
    void* start = memory_.get();
    floats_ = static_cast<float*>(start == nullptr ? nullptr : std::align(kCacheLine, bytes, start, space));
    return floats_ != nullptr;
  }
  float* Get() { return floats_; }

 private:
  static constexpr int64_t kInside = 2048;
  alignas(kCacheLine) float inside_[kInside];
  std::unique_ptr<unsigned char[]> memory_;
  float* floats_ = inside_;
};

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// One call of `Parallel`: the numbered units of a plan.
class Round {
 public:
  Round(const Task& task, const Instructions& instructions, const Plan& plan, float* scratch, int64_t threads,
        const PackedFactors* packed)
      : task_(task),
        instructions_(instructions),
        kernels_(instructions.For(task.type)),
        plan_(plan),
        scratch_(scratch),
        queues_(std::min(threads, kQueues)),
        packed_(packed) {}

  static void Work(void* self, size_t thread) { static_cast<Round*>(self)->Participate(static_cast<int64_t>(thread)); }

 private:
  void Participate(int64_t thread) {
    float* own = scratch_ + plan_.Scratch() + thread * plan_.OwnScratch();
    RunStage(0, thread, own);
    for (int turns = 0; done_.load(std::memory_order_acquire) < plan_.Units(0); ++turns) {
      if (turns < 4096) {
        Pause();
      } else {
        std::this_thread::yield();
      }
    }
    RunStage(1, thread, own);
  }

  // Takes units until there are none: of a thread's own queue, then of the others. A queue is a range of units.
  void RunStage(int stage, int64_t thread, float* own) {
    for (int64_t turn = 0; turn < queues_; ++turn) {
      const int64_t queue = (thread + turn) % queues_, first = FirstOf(stage, queue), end = FirstOf(stage, queue + 1);
      std::atomic<int64_t>& next = taken_[stage][queue].units;
      for (int64_t i; (i = first + next.fetch_add(1, std::memory_order_relaxed)) < end;) {
        if (stage == 0 && i == first) AskFor(stage, i);
        i + 1 < end ? AskFor(stage, i + 1) : AskFor(stage + 1, FirstOf(stage + 1, queue));
        const Unit unit = plan_.Find(stage, i);
        stage == 0 ? RunFirst(unit, own) : RunSecond(unit, own);
        if (stage == 0) done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  int64_t FirstOf(int stage, int64_t queue) const { return stage > 1 ? 0 : plan_.Units(stage) * queue / queues_; }

  // With few rows: asks for the start of U or V of a unit that this thread is likely to take. The kernels ask for the
  // rest.
  void AskFor(int stage, int64_t i) const {
    if (stage > 1) return;
    const Unit unit = plan_.Find(stage, i);
    const Member& member = task_.members[unit.member];
    if (!plan_.IsFew(*unit.segment) || member.rank == 0) return;
    const int64_t begin = BeginOf(unit), columns = EndOf(unit) - begin, size = cpu::SizeOf(task_.type);
    const int64_t bytes = std::min(columns * member.rank * size, cpu::kBlockBytes);
    const PackedMember* packed = PackedOf(unit.member);
    if (stage == 0) {
      cpu::Prefetch(At(UOf(unit), begin * member.rank), bytes);
    } else if (packed == nullptr) {
      const int64_t each = std::min(columns * size, std::max<int64_t>(256, cpu::kBlockBytes / member.rank));
      for (int64_t j = 0; j < member.rank; ++j) cpu::Prefetch(At(VOf(unit), j * task_.features + begin), each);
    } else if (packed->m == nullptr) {
      cpu::Prefetch(At(packed->v, begin * member.rank), bytes);
    }
  }

  void RunFirst(const Unit& unit, float* own) const {
    const Member& member = task_.members[unit.member];
    const Segment& segment = *unit.segment;
    float* to = scratch_ + plan_.ScratchOf(segment, unit.member);
    if (!plan_.IsFew(segment)) {
      MakePanels(unit, to);
      return;
    }
    const Rows rows = RowsOf(segment, 0, segment.rows);
    const int64_t begin = BeginOf(unit), end = EndOf(unit);
    const PackedMember* packed = PackedOf(unit.member);
    to += unit.piece * segment.rows * member.rank;
    if (packed != nullptr && packed->m != nullptr) {
      kernels_.project_tiles(rows, At(packed->u, begin * member.rank), member.rank, begin, end, own, to);
    } else {
      kernels_.project(rows, UOf(unit), member.rank, begin, end, to);
    }
  }

  void MakePanels(const Unit& unit, float* panels) const {
    const Cut& cut = plan_.Of(unit.member);
    const int64_t begin = unit.piece / cut.panel_sets * cpu::kPanelDepth;
    const int64_t end = std::min(task_.features, begin + cpu::kPanelDepth);
    const int64_t first = unit.piece % cut.panel_sets * Plan::kPanelSet * cpu::kPanelColumns;
    const int64_t last = std::min(cut.columns, first + Plan::kPanelSet * cpu::kPanelColumns);
    for (int64_t column = first; column < last; column += cpu::kPanelColumns) {
      float* panel = PanelAt(panels, cut, begin, end, column);
      kernels_.pack(UOf(unit), task_.members[unit.member].rank, begin, end, column, panel);
    }
  }

  void RunSecond(const Unit& unit, float* own) const {
    const Segment& segment = *unit.segment;
    float* scratch = scratch_ + plan_.ScratchOf(segment, unit.member);
    plan_.IsFew(segment) ? UpdateColumns(unit, scratch, own) : UpdateRows(unit, scratch, own);
  }

  // Few rows: the unit's columns of Y.
  void UpdateColumns(const Unit& unit, const float* products, float* own) const {
    const Segment& segment = *unit.segment;
    const Rows rows = RowsOf(segment, 0, segment.rows);
    const int64_t rank = task_.members[unit.member].rank, size = rows.count * rank;
    const float* t = Sum(products, plan_.Of(unit.member).pieces, size, own);
    void* y = const_cast<void*>(At(task_.members[unit.member].y, segment.row * task_.features));
    const PackedMember* packed = PackedOf(unit.member);
    if (packed == nullptr) {
      const int64_t begin = BeginOf(unit);
      kernels_.update(rows, t, rank, At(VOf(unit), begin), task_.features, rank, begin, EndOf(unit), y);
    } else if (packed->m == nullptr) {
      UpdateByTiles(rows, unit, t, packed->v, true, y);
    } else {
      kernels_.project({t, rows.count, rank}, packed->m, rank, 0, rank, own + size);  // T M, in float32
      UpdateByTiles(rows, unit, own + size, packed->u, false, y);
    }
  }

  void UpdateByTiles(const Rows& rows, const Unit& unit, const float* t, const unsigned char* tiles, bool is_new,
                     void* y) const {
    const int64_t rank = task_.members[unit.member].rank, end = EndOf(unit), size = cpu::SizeOf(task_.type);
    for (int64_t column = BeginOf(unit); column < end; column += cpu::kPackedColumns) {
      const int64_t width = std::min(cpu::kPackedColumns, end - column);
      const void* tile = At(tiles, column * rank);
      // What follows is a tile too, of this unit or of the next.
      if (is_new && rank > 0) cpu::Prefetch(At(tile, cpu::kBlockBytes / size), width * rank * size);
      kernels_.update(rows, t, rank, tile, width, rank, column, column + width, y);
    }
  }

  // Many rows: the unit's rows of Y.
  void UpdateRows(const Unit& unit, float* panels, float* own) const {
    const Segment& segment = *unit.segment;
    const Member& member = task_.members[unit.member];
    const Cut& cut = plan_.Of(unit.member);
    const int64_t d = task_.features, step = Plan::BlockRows(segment), begin = unit.piece * step;
    const Rows rows = RowsOf(segment, begin, std::min(step, segment.rows - begin));
    const float* t = Multiply(rows, panels, cut, own);
    void* y = const_cast<void*>(At(member.y, (segment.row + begin) * d));
    kernels_.update(rows, t, cut.columns, VOf(unit), d, member.rank, 0, d, y);
  }

  // The columns of a unit of few rows.
  int64_t BeginOf(const Unit& unit) const { return unit.piece * plan_.Of(unit.member).width; }
  int64_t EndOf(const Unit& unit) const {
    return std::min(task_.features, BeginOf(unit) + plan_.Of(unit.member).width);
  }

  const PackedMember* PackedOf(int64_t member) const {
    return packed_ == nullptr ? nullptr : &packed_->members[member];
  }

  // U and V of a unit's adapter; U may be packed, as it is or as tiles.
  const void* UOf(const Unit& unit) const {
    if (packed_ != nullptr) return packed_->members[unit.member].u;
    const Member& member = task_.members[unit.member];
    return At(member.u, unit.segment->adapter * task_.features * member.rank);
  }
  const void* VOf(const Unit& unit) const {
    const Member& member = task_.members[unit.member];
    return At(member.v, unit.segment->adapter * task_.features * member.rank);
  }

  // The sum of the pieces' products, in their order.
  const float* Sum(const float* products, int64_t pieces, int64_t size, float* total) const {
    if (pieces <= 1) return products;
    for (int64_t i = 0; i < size; ++i) total[i] = products[i] + products[size + i];
    for (int64_t piece = 2; piece < pieces; ++piece)
      for (int64_t i = 0; i < size; ++i) total[i] += products[piece * size + i];
    return total;
  }

  const float* Multiply(const Rows& rows, float* panels, const Cut& cut, float* t) const {
    std::fill(t, t + rows.count * cut.columns, 0.0f);
    for (int64_t begin = 0; begin < rows.features; begin += cpu::kPanelDepth) {
      const int64_t end = std::min(rows.features, begin + cpu::kPanelDepth);
      for (int64_t column = 0; column < cut.columns; column += cpu::kPanelColumns) {
        kernels_.multiply(rows, PanelAt(panels, cut, begin, end, column), begin, end, t + column, cut.columns);
      }
    }
    return t;
  }

  // Panels of the same rows of U follow one another, then those of the next rows.
  float* PanelAt(float* panels, const Cut& cut, int64_t begin, int64_t end, int64_t column) const {
    return panels + begin * cut.columns + column * instructions_.PaddedDepth(end - begin);
  }

  Rows RowsOf(const Segment& segment, int64_t first, int64_t count) const {
    return {At(task_.x, (segment.row + first) * task_.features), count, task_.features};
  }

  const void* At(const void* data, int64_t element) const {
    return static_cast<const unsigned char*>(data) + element * cpu::SizeOf(task_.type);
  }

  const Task& task_;
  const Instructions& instructions_;
  const Kernels& kernels_;
  const Plan& plan_;
  float* const scratch_;
  const int64_t queues_;
  const PackedFactors* const packed_;
  // Each in a cache line of its own: threads count here at the same time.
  struct alignas(kCacheLine) Counter {
    std::atomic<int64_t> units{0};
  };
  Counter taken_[2][kQueues];
  alignas(kCacheLine) std::atomic<int64_t> done_{0};
};

const char* Run(const Instructions& instructions, const Task& task, const Parallel& parallel,
                const PackedFactors* packed) {
  if (task.rows > cpu::kFewRows) packed = nullptr;
  Plan plan(task, instructions, packed);
  if (const char* reason = plan.Read()) return reason;
  for (size_t segment = 0; segment < plan.Segments();) {
    segment = plan.Number(segment, kScratchLimit);
    int64_t threads = std::clamp(plan.Work() / kWorthAThread, int64_t{1}, int64_t{std::max(1, parallel.threads)});
    threads = std::min(threads, std::max(plan.Units(0), plan.Units(1)));
    Scratch scratch;
    if (!scratch.Reserve(plan.Scratch() + threads * plan.OwnScratch())) return "no memory";
    Round round(task, instructions, plan, scratch.Get(), threads, packed);
    if (threads == 1) {
      Round::Work(&round, 0);
    } else {
      parallel.run(parallel, Round::Work, static_cast<size_t>(threads), &round);
    }
  }
  return nullptr;
}

}  // namespace

const char* ReflectOnCpuWith(const Instructions& instructions, const Task& task, const Parallel& parallel,
                             const PackedFactors* packed) {
  if (task.rows == 0 || task.features == 0 || task.count == 0) return nullptr;
  try {
    return Run(instructions, task, parallel, packed);
  } catch (const std::bad_alloc&) {
    return "no memory";
  }
}

const char* ReflectOnCpu(const Task& task, const Parallel& parallel, const PackedFactors* packed) {
  return ReflectOnCpuWith(cpu::BestInstructions(), task, parallel, packed);
}

}  // namespace hra
