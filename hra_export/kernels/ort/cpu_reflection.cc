// The units of a plan, run by whatever threads there are.
//
// Each thread takes units of stage 1 until there are none, waits for those that others still have, and goes on with
// stage 2: one call of `Parallel`. A unit that has been taken is being run, so that nobody waits for a thread that has
// not started; all works with a single thread as well.

#include "cpu_reflection.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#include "cpu_packing.h"
#include "cpu_plan.h"

#if defined(_MSC_VER) && defined(HRA_X86)
#include <intrin.h>
#elif defined(HRA_X86)
#include <cpuid.h>
#endif

namespace hra {
namespace {

using cpu::Cut;
using cpu::Instructions;
using cpu::Kernels;
using cpu::Plan;
using cpu::Rows;
using cpu::Segment;
using cpu::Unit;

constexpr int64_t kScratchLimit = 16 << 20;    // floats for the segments that share a call of `Parallel`
constexpr int64_t kWorthAThread = 96 << 10;    // bytes: what is read in the time that a thread needs to come and go
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
        const void* packed)
      : task_(task),
        instructions_(instructions),
        kernels_(instructions.For(task.type)),
        plan_(plan),
        scratch_(scratch),
        threads_(threads),
        packed_(static_cast<const unsigned char*>(packed)) {}

  static void Work(void* self, size_t thread) { static_cast<Round*>(self)->Participate(static_cast<int64_t>(thread)); }

 private:
  void Participate(int64_t thread) {
    const int64_t packs = plan_.Units(0), updates = plan_.Units(1);
    for (int64_t i; (i = taken_[0].fetch_add(1, std::memory_order_relaxed)) < packs;) {
      if (i < threads_) AskFor(i);
      AskFor(i + threads_);
      RunFirst(plan_.Find(0, i));
      done_.fetch_add(1, std::memory_order_release);
    }
    int64_t i = taken_[1].fetch_add(1, std::memory_order_relaxed);
    if (i >= updates) return;
    for (int turns = 0; done_.load(std::memory_order_acquire) < packs; ++turns) {
      if (turns < 4096) {
        Pause();
      } else {
        std::this_thread::yield();
      }
    }
    float* own = scratch_ + plan_.Scratch() + thread * plan_.OwnScratch();
    for (; i < updates; i = taken_[1].fetch_add(1, std::memory_order_relaxed)) {
      AskFor(packs + i + threads_);
      RunSecond(plan_.Find(1, i), own);
    }
  }

  // With few rows: asks for the start of U or V of a unit that this thread is likely to take, counted over both stages.
  // The kernels ask for the rest.
  void AskFor(int64_t unit) const {
    const int stage = unit < plan_.Units(0) ? 0 : 1;
    if (stage == 1) unit -= plan_.Units(0);
    if (unit >= plan_.Units(stage)) return;
    const Unit found = plan_.Find(stage, unit);
    const Member& member = task_.members[found.member];
    if (!plan_.IsFew(*found.segment) || member.rank == 0) return;
    const Cut& cut = plan_.Of(found.member);
    const int64_t d = task_.features, factor = found.segment->adapter * d * member.rank, size = cpu::SizeOf(task_.type);
    if (stage == 0) {
      const int64_t begin = found.piece * cut.depth, rows = std::min(d - begin, cut.depth);
      const int64_t bytes = std::min(rows * member.rank * size, cpu::kBlockBytes);
      cpu::Prefetch(At(UOf(found), begin * member.rank), bytes);
      return;
    }
    const int64_t begin = found.piece * cut.width, columns = std::min(d - begin, cut.width);
    if (packed_ != nullptr) {
      cpu::Prefetch(TileOf(found.member, begin), std::min(columns * member.rank * size, cpu::kBlockBytes));
      return;
    }
    const int64_t bytes = std::min(columns * size, std::max<int64_t>(256, cpu::kBlockBytes / member.rank));
    for (int64_t j = 0; j < member.rank; ++j) cpu::Prefetch(At(member.v, factor + j * d + begin), bytes);
  }

  void RunFirst(const Unit& unit) {
    const Member& member = task_.members[unit.member];
    const Cut& cut = plan_.Of(unit.member);
    const int64_t d = task_.features;
    float* to = scratch_ + plan_.ScratchOf(*unit.segment, unit.member);
    if (plan_.IsFew(*unit.segment)) {
      const int64_t begin = unit.piece * cut.depth;
      kernels_.project(RowsOf(*unit.segment, 0, unit.segment->rows), UOf(unit), member.rank, begin,
                       std::min(d, begin + cut.depth), to + unit.piece * unit.segment->rows * member.rank);
      return;
    }
    const int64_t begin = unit.piece / cut.panel_sets * cpu::kPanelDepth, end = std::min(d, begin + cpu::kPanelDepth);
    const int64_t first = unit.piece % cut.panel_sets * Plan::kPanelSet * cpu::kPanelColumns;
    const int64_t last = std::min(cut.columns, first + Plan::kPanelSet * cpu::kPanelColumns);
    for (int64_t column = first; column < last; column += cpu::kPanelColumns) {
      const void* u = At(member.u, unit.segment->adapter * d * member.rank);
      kernels_.pack(u, member.rank, begin, end, column, PanelAt(to, cut, begin, end, column));
    }
  }

  void RunSecond(const Unit& unit, float* own) {
    const Member& member = task_.members[unit.member];
    const Segment& segment = *unit.segment;
    const Cut& cut = plan_.Of(unit.member);
    const bool is_few = plan_.IsFew(segment);
    const int64_t d = task_.features, step = is_few ? cut.width : Plan::BlockRows(segment), begin = unit.piece * step;
    // Of few rows some columns, of many some rows.
    const Rows rows = is_few ? RowsOf(segment, 0, segment.rows)
                             : RowsOf(segment, begin, std::min(step, segment.rows - begin));
    const int64_t from = is_few ? begin : 0, to = is_few ? std::min(d, begin + step) : d;
    const int64_t y = (segment.row + (is_few ? 0 : begin)) * d;
    float* scratch = scratch_ + plan_.ScratchOf(segment, unit.member);
    const float* t = is_few ? Sum(scratch, cut.pieces, rows.count * member.rank, own)
                            : Multiply(rows, scratch, cut, own);
    void* out = const_cast<void*>(At(member.y, y));
    if (is_few && packed_ != nullptr) {
      UpdateByTiles(rows, t, unit.member, from, to, out);
      return;
    }
    const void* v = At(member.v, segment.adapter * d * member.rank + from);
    kernels_.update(rows, t, is_few ? member.rank : cut.columns, v, d, member.rank, from, to, out);
  }

  void UpdateByTiles(const Rows& rows, const float* t, int64_t member, int64_t begin, int64_t end, void* y) const {
    const int64_t rank = task_.members[member].rank;
    for (int64_t column = begin; column < end; column += cpu::kPackedColumns) {
      const int64_t width = std::min(cpu::kPackedColumns, end - column);
      const unsigned char* tile = TileOf(member, column);
      // What follows is a tile too, of this unit or of the next.
      cpu::Prefetch(tile + cpu::kBlockBytes, width * rank * cpu::SizeOf(task_.type));
      kernels_.update(rows, t, rank, tile, width, rank, column, column + width, y);
    }
  }

  // U of few rows.
  const void* UOf(const Unit& unit) const {
    if (packed_ != nullptr) return packed_ + cpu::PackedU(task_, unit.member);
    const Member& member = task_.members[unit.member];
    return At(member.u, unit.segment->adapter * task_.features * member.rank);
  }

  // The packed tile of V that starts at a column.
  const unsigned char* TileOf(int64_t member, int64_t column) const {
    return packed_ + cpu::PackedV(task_, member) + column * task_.members[member].rank * cpu::SizeOf(task_.type);
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
  const int64_t threads_;
  const unsigned char* const packed_;
  // Each in a cache line of its own: threads count here at the same time.
  alignas(kCacheLine) std::atomic<int64_t> taken_[2] = {0, 0};
  alignas(kCacheLine) std::atomic<int64_t> done_{0};
};

const char* Run(const Instructions& instructions, const Task& task, const Parallel& parallel, const void* packed) {
  Plan plan(task, instructions);
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

#if defined(HRA_X86) && defined(_MSC_VER)
// Bits of CPUID 7 (EBX) and 1 (ECX), with the registers that the system saves (XCR0).
bool Has(const char* name) {
  int basic[4], extended[4];
  __cpuid(basic, 1);
  __cpuidex(extended, 7, 0);
  constexpr int kFma = 1 << 12, kSaves = 1 << 27, kF16c = 1 << 29, kAvx2Bit = 1 << 5;
  constexpr unsigned kAvx512Bits = 1U << 16 | 1U << 17 | 1U << 30 | 1U << 31;
  if ((basic[2] & (kFma | kSaves | kF16c)) != (kFma | kSaves | kF16c)) return false;
  const auto saved = _xgetbv(0);
  const bool has_avx2 = (extended[1] & kAvx2Bit) != 0 && (saved & 6) == 6;
  const bool has_avx512 = (static_cast<unsigned>(extended[1]) & kAvx512Bits) == kAvx512Bits && (saved & 0xE6) == 0xE6;
  return std::strcmp(name, "avx2") == 0 ? has_avx2 : has_avx2 && has_avx512;
}
#elif defined(HRA_X86)
bool Has(const char* name) {
  // Not every compiler knows the name of F16C.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  const bool has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0) return has_avx2;
  return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Instructions& Best() {
  static const Instructions& best = []() -> const Instructions& {
    for (const char* name : {"avx512", "avx2"})
      if (const Instructions* found = FindInstructions(name)) return *found;
    return cpu::kBaseline;
  }();
  return best;
}

}  // namespace

const Instructions* FindInstructions(const char* name) {
#ifdef HRA_X86
  for (const Instructions* each : {&cpu::kAvx512, &cpu::kAvx2})
    if (std::strcmp(each->name, name) == 0) return Has(name) ? each : nullptr;
#endif
  return std::strcmp(name, cpu::kBaseline.name) == 0 ? &cpu::kBaseline : nullptr;
}

const char* ReflectOnCpuWith(const Instructions& instructions, const Task& task, const Parallel& parallel,
                             const void* packed) {
  if (task.rows == 0 || task.features == 0 || task.count == 0) return nullptr;
  try {
    return Run(instructions, task, parallel, packed);
  } catch (const std::bad_alloc&) {
    return "no memory";
  }
}

const char* ReflectOnCpu(const Task& task, const Parallel& parallel, const void* packed) {
  return ReflectOnCpuWith(Best(), task, parallel, packed);
}

const char* CpuInstructions() { return Best().name; }

}  // namespace hra
