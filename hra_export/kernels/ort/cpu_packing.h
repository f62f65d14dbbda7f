// Constant factors in the order in which few rows read them: one stream, which processors fetch ahead of time.
//
//     U_1 … U_k as they are, then V_1 … V_k in tiles: r rows of 64 columns (the last tile has what is left), and so on
//
// Read where they are, V is r streams that end after d elements: 21 GB/s instead of 33 GB/s on one core (Zen 5, d = 576,
// r = 8). Every factor starts at a cache line.
//
// Letters: d features, r rank, k members.
#pragma once

#include <cstddef>
#include <cstdint>

#include "task.h"

namespace hra::cpu {

constexpr int64_t kFewRows = 12;  // of more rows, factors are not read packed
constexpr int64_t kPackedColumns = 64;

// Of the type, in bytes.
constexpr int64_t SizeOf(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// Bytes that the packed factors of a task take; the task has no index, and of it only the type, d and the ranks count.
int64_t PackedBytes(const Task& task);

// Packs U and V of every member.
void Pack(const Task& task, void* to);

// Where U or V of a member starts, in bytes.
int64_t PackedU(const Task& task, int64_t member);
int64_t PackedV(const Task& task, int64_t member);

}  // namespace hra::cpu
