// Tiles for the tensor cores: what a lane holds of them, how it is read, multiplied and stored.
//
// Everything is done in tiles of 16 × 16, and a lane always holds the same places (g = lane / 4, t = lane % 4):
//   left    of X and X U:   rows g and g + 8, columns 4t … 4t + 3
//   right   of U and V:     rows 4t … 4t + 3, columns 2g and 2g + 1
//   result  of X U and Y:   rows g and g + 8, columns 4t … 4t + 3, float32
// The tensor core's own order of columns differs; since the order of a sum's terms and of a product's columns is free,
// giving it the columns renumbered makes every load and store 8 or 4 neighbouring bytes, with nothing staged.
// X U goes back in as two terms of the type, high and low, so that it keeps twice the type's digits.
#pragma once

#include "cuda_problem.cuh"

namespace hra {
namespace device {

constexpr int kTile = 16;

// A tile of the left operand: two rows of four.
struct Left {
  uint32_t word[4];
};

struct Right {
  uint32_t word[2][2];  // for even columns, for odd columns
};

struct Result {
  float of[2][4];  // even columns, odd columns
};

using Quad = Neighbours<float, 4>;
using LeftWords = Neighbours<uint32_t, 4>;

__device__ __forceinline__ uint32_t Pack(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

// Four neighbouring elements of a row as two words; zeros from `count` on.
template <class T>
__device__ __forceinline__ Neighbours<uint32_t, 2> LoadFour(const T* from, int64_t count, bool quads) {
  if (count <= 0) return {};
  if (quads) return *reinterpret_cast<const Neighbours<uint32_t, 2>*>(from);
  uint16_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = i < count ? from[i].bits : uint16_t{0};
  return {{Pack(bits[0], bits[1]), Pack(bits[2], bits[3])}};
}

// A tile of X from its first element on; zeros outside of `rows` rows and `columns` columns.
template <class T>
__device__ __forceinline__ Left LoadLeft(const T* from, int64_t stride, int rows, int64_t columns, bool quads) {
  const int row = Thread() % kLanes / 4;
  const int column = Thread() % 4 * 4;
  const auto upper = LoadFour(from + row * stride + column, row < rows ? columns - column : 0, quads);
  const auto lower = LoadFour(from + (row + 8) * stride + column, row + 8 < rows ? columns - column : 0, quads);
  return {{upper.element[0], lower.element[0], upper.element[1], lower.element[1]}};
}

// A tile of U or V from its first element on; zeros outside of `rows` rows and `columns` columns.
template <class T>
__device__ __forceinline__ Right LoadRight(const T* from, int64_t stride, int64_t rows, int64_t columns, bool pairs) {
  const int row = Thread() % 4 * 4;
  const int column = Thread() % kLanes / 4 * 2;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T* at = from + (row + i) * stride + column;
    const int64_t count = row + i < rows ? columns - column : 0;
    if (count <= 0)
      words[i] = 0;
    else if (pairs)
      words[i] = *reinterpret_cast<const uint32_t*>(at);
    else
      words[i] = Pack(at[0].bits, count > 1 ? at[1].bits : uint16_t{0});
  }
  return {{{(words[0] & 0xffffu) | words[1] << 16, (words[2] & 0xffffu) | words[3] << 16},
           {words[0] >> 16 | (words[1] & 0xffff0000u), words[2] >> 16 | (words[3] & 0xffff0000u)}}};
}

template <class T>
__device__ __forceinline__ void Multiply(Result& result, const Left& left, const Right& right) {
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) Mma<T>(result.of[odd], left.word, right.word[odd][0], right.word[odd][1]);
}

// Row g (half 0) or g + 8 (half 1) of a result: its four columns in order.
__device__ __forceinline__ Quad RowOf(const Result& result, int half) {
  return {{result.of[0][2 * half], result.of[1][2 * half], result.of[0][2 * half + 1], result.of[1][2 * half + 1]}};
}

__device__ __forceinline__ void AddToRow(Result& result, int half, const Quad& quad) {
  result.of[0][2 * half] += quad.element[0];
  result.of[1][2 * half] += quad.element[1];
  result.of[0][2 * half + 1] += quad.element[2];
  result.of[1][2 * half + 1] += quad.element[3];
}

// Four float32 as four of the type, and what is left of them as four more. What is infinite leaves nothing.
template <class T>
__device__ __forceinline__ void Split(const Quad& value, uint16_t (&high)[4], uint16_t (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T rounded = FromFloat<T>(value.element[i]);
    const float back = ToFloat(rounded);
    high[i] = rounded.bits;
    low[i] = FromFloat<T>(back - back == 0.0f ? value.element[i] - back : 0.0f).bits;
  }
}

// Rounds four neighbouring x + sum and stores the first `count` of them. x: two words of elements.
template <class T>
__device__ __forceinline__ void StoreFour(uint32_t x0, uint32_t x1, const Quad& sum, T* to, int64_t count, bool quads) {
  const uint32_t words[2] = {x0, x1};
  uint16_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T element = {static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)};
    bits[i] = FromFloat<T>(ToFloat(element) + sum.element[i]).bits;
  }
  if (quads) {
    *reinterpret_cast<Neighbours<uint32_t, 2>*>(to) = {{Pack(bits[0], bits[1]), Pack(bits[2], bits[3])}};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = {bits[i]};
  }
}

}  // namespace device
}  // namespace hra
