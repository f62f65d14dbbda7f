#include "cpu_packing.h"

#include <algorithm>
#include <cstring>

#include "cpu_coefficients.h"

namespace hra::cpu {
namespace {

constexpr int64_t kCacheLine = 64;

int64_t Lines(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// The rows of a matrix (r, d) in tiles.
void WriteTiles(const unsigned char* rows, int64_t rank, int64_t d, int64_t size, unsigned char* tile) {
  for (int64_t column = 0; column < d; column += kPackedColumns) {
    const int64_t bytes = std::min(kPackedColumns, d - column) * size;
    for (int64_t j = 0; j < rank; ++j, tile += bytes) {
      std::memcpy(tile, rows + (j * d + column) * size, static_cast<size_t>(bytes));
    }
  }
}

std::vector<float> Transposed(const float* u, int64_t d, int64_t rank) {
  std::vector<float> rows(static_cast<size_t>(d * rank));
  for (int64_t k = 0; k < d; ++k)
    for (int64_t j = 0; j < rank; ++j) rows[j * d + k] = u[k * rank + j];
  return rows;
}

}  // namespace

Packing::Packing(const Task& task) : task_(task) {
  for (int64_t i = 0; i < task.count; ++i) {
    const Member& member = task.members[i];
    if (task.type == Type::kFloat32) {
      const auto *u = static_cast<const float*>(member.u), *v = static_cast<const float*>(member.v);
      m_[i] = Coefficients(u, v, task.features, member.rank);
    }
    const int64_t factor = Lines(task.features * member.rank * SizeOf(task.type));
    bytes_ += factor + (m_[i].empty() ? factor : Lines(static_cast<int64_t>(m_[i].size() * sizeof(float))));
  }
}

PackedFactors Packing::To(void* memory) const {
  PackedFactors packed{task_.features, {}};
  auto* next = static_cast<unsigned char*>(memory);
  const int64_t d = task_.features, size = SizeOf(task_.type);
  const auto take = [&next](int64_t bytes) {
    unsigned char* taken = next;
    next += Lines(bytes);
    return taken;
  };
  for (int64_t i = 0; i < task_.count; ++i) {
    const Member& member = task_.members[i];
    const int64_t rank = member.rank, bytes = d * rank * size;
    unsigned char* u = take(bytes);
    packed.members[i] = {rank, u, nullptr, nullptr};
    if (bytes == 0) continue;
    if (m_[i].empty()) {
      std::memcpy(u, member.u, static_cast<size_t>(bytes));
    } else {
      const std::vector<float> rows = Transposed(static_cast<const float*>(member.u), d, rank);
      WriteTiles(reinterpret_cast<const unsigned char*>(rows.data()), rank, d, size, u);
    }
  }
  for (int64_t i = 0; i < task_.count; ++i) {
    const Member& member = task_.members[i];
    const int64_t bytes = d * member.rank * size;
    if (bytes == 0) continue;
    if (m_[i].empty()) {
      unsigned char* v = take(bytes);
      WriteTiles(static_cast<const unsigned char*>(member.v), member.rank, d, size, v);
      packed.members[i].v = v;
    } else {
      const auto m_bytes = static_cast<int64_t>(m_[i].size() * sizeof(float));
      unsigned char* m = take(m_bytes);
      std::memcpy(m, m_[i].data(), static_cast<size_t>(m_bytes));
      packed.members[i].m = reinterpret_cast<const float*>(m);
    }
  }
  return packed;
}

}  // namespace hra::cpu
