#include "cpu_packing.h"

#include <algorithm>
#include <cstring>

namespace hra::cpu {
namespace {

constexpr int64_t kCacheLine = 64;

int64_t FactorBytes(const Task& task, int64_t member) {
  const int64_t bytes = task.features * task.members[member].rank * SizeOf(task.type);
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

int64_t FactorsBefore(const Task& task, int64_t member) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < member; ++i) bytes += FactorBytes(task, i);
  return bytes;
}

}  // namespace

int64_t PackedU(const Task& task, int64_t member) { return FactorsBefore(task, member); }

int64_t PackedV(const Task& task, int64_t member) {
  return FactorsBefore(task, task.count) + FactorsBefore(task, member);
}

int64_t PackedBytes(const Task& task) { return 2 * FactorsBefore(task, task.count); }

void Pack(const Task& task, void* to) {
  auto* packed = static_cast<unsigned char*>(to);
  const int64_t d = task.features, size = SizeOf(task.type);
  for (int64_t i = 0; i < task.count; ++i) {
    const Member& member = task.members[i];
    if (member.rank == 0 || d == 0) continue;
    std::memcpy(packed + PackedU(task, i), member.u, static_cast<size_t>(d * member.rank * size));
    const auto* v = static_cast<const unsigned char*>(member.v);
    unsigned char* tile = packed + PackedV(task, i);
    for (int64_t column = 0; column < d; column += kPackedColumns) {
      const int64_t bytes = std::min(kPackedColumns, d - column) * size;
      for (int64_t j = 0; j < member.rank; ++j, tile += bytes) {
        std::memcpy(tile, v + (j * d + column) * size, static_cast<size_t>(bytes));
      }
    }
  }
}

}  // namespace hra::cpu
