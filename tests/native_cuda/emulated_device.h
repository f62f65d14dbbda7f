// CUDA's execution model on the CPU, for tests: it takes the place of hra_export/kernels/ort/cuda_device.cuh, so that
// the kernels' own source runs under the sanitizers of a C++ compiler.
//
// The threads of a cluster are fibers on one thread of the CPU. A fiber runs until it must wait at a barrier; then the
// next of its block does. The first block lags: at each of its barriers all others run ahead, one after the other, as
// far as they can. The order is ascending in one launch and descending in the next, so that what relies on an order
// that CUDA does not promise comes out wrong. Each block's shared memory is a piece of the heap of exactly the size
// asked for; it starts as NaN, and is NaN again when the block has ended, so that what is read too early or too late is
// seen. Vector loads check their alignment (UBSan). Clusters run one after the other.
//
// What it cannot show: data races that all these orders hide, speed, and how the compiler for the device sees the
// source.
#pragma once
#define HRA_CUDA_DEVICE_CUH

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace hra {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace device {

struct Shape {
  unsigned blocks_x;
  unsigned blocks_y;
  unsigned cluster;
  unsigned threads;
  unsigned shared_bytes;
};

struct Properties {
  int compute_major;
  int multiprocessors;
  int shared_limit;
};

// The device that Query reports, and what was last launched on it.
inline Properties emulated = {9, 132, 227 * 1024};
inline Shape last_shape = {};
inline int launches = 0;

inline int Thread() { return fibers::Current().thread; }
inline unsigned BlockX() { return fibers::Current().block->x; }
inline unsigned BlockY() { return fibers::Current().block->y; }
inline unsigned BlocksY() { return last_shape.blocks_y; }
inline char* Shared() { return fibers::Current().block->shared; }
inline void SyncBlock() { fibers::Wait(fibers::Arrive(fibers::Current().block->barrier)); }

inline void ArriveCluster() {
  fibers::Fiber& self = fibers::Current();
  fibers::Require(emulated.compute_major >= 9, "a cluster's barrier needs compute capability 9.0");
  fibers::Require(!self.arrived.barrier, "arrived twice at the cluster's barrier");
  self.arrived = fibers::Arrive(*self.cluster_barrier);
}

inline void WaitCluster() {
  fibers::Fiber& self = fibers::Current();
  fibers::Require(self.arrived.barrier, "waits at the cluster's barrier without having arrived");
  fibers::Wait(self.arrived);
  self.arrived = {};
}

template <class T>
T* Peer(T* mine, int rank) {
  fibers::Fiber& self = fibers::Current();
  fibers::Require(rank >= 0 && rank < static_cast<int>(last_shape.cluster), "no such block in the cluster");
  const fibers::Block* theirs = self.block - self.block->rank + rank;
  fibers::Require(theirs->started && theirs->running > 0, "uses the shared memory of a block that does not run");
  return reinterpret_cast<T*>(theirs->shared + (reinterpret_cast<char*>(mine) - self.block->shared));
}

// Reads what lane `from` gives in the same exchange of its warp.
struct Exchange {
  uint32_t words[6];
};

inline const Exchange* Give(const Exchange& mine) {
  fibers::Fiber& self = fibers::Current();
  fibers::Warp& warp = *self.warp;
  // Two sets of places: no lane begins the exchange after next before all have read this one.
  auto* places = reinterpret_cast<Exchange*>(warp.places[self.exchanges++ % 2]);
  places[self.thread % fibers::kLanes] = mine;
  fibers::Wait(fibers::Arrive(warp.barrier));
  return places;
}

inline float ShuffleXor(float value, int mask) {
  Exchange mine = {};
  std::memcpy(mine.words, &value, sizeof value);
  std::memcpy(&value, Give(mine)[Thread() % fibers::kLanes ^ mask].words, sizeof value);
  return value;
}

inline void Prefetch(const void* address) {
  [[maybe_unused]] const volatile char read = *static_cast<const volatile char*>(address);
}

inline uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float ToFloat(float value) { return value; }
inline float ToFloat(BFloat16 value) { return FromBits(static_cast<uint32_t>(value.bits) << 16); }

inline float ToFloat(Half value) {
  const int exponent = value.bits >> 10 & 31;
  const int fraction = value.bits & 1023;
  const int whole = exponent == 0 ? fraction : fraction + 1024;
  float magnitude = std::ldexp(static_cast<float>(whole), (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return value.bits >> 15 ? -magnitude : magnitude;
}

template <class T>
T FromFloat(float value);

template <>
inline float FromFloat<float>(float value) {
  return value;
}

template <>
inline BFloat16 FromFloat<BFloat16>(float value) {
  const uint32_t bits = Bits(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Half FromFloat<Half>(float value) {
  const uint16_t sign = static_cast<uint16_t>(Bits(value) >> 31 << 15);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (magnitude == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  if (exponent < -13) exponent = -13;  // subnormal from here on
  // In units of the last place, to nearest even: the default rounding mode.
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  const int biased = exponent + 13;
  return {static_cast<uint16_t>(sign | ((static_cast<unsigned>(biased) << 10) + units))};
}

// The operands' places are those of the PTX ISA's mma.m16n8k16; sums are float32 in ascending order.
template <class T>
void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Exchange* lanes = Give({{a[0], a[1], a[2], a[3], b0, b1}});
  const auto half_of = [](uint32_t word, int k) {
    return ToFloat(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word & 0xffffu)});
  };
  const int lane = Thread() % fibers::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i / 2 ? 8 : 0);
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = lanes[row % 8 * 4 + k % 8 / 2].words[(k / 8) * 2 + row / 8];
      const uint32_t right = lanes[column * 4 + k % 8 / 2].words[4 + k / 8];
      c[i] += half_of(left, k) * half_of(right, k);
    }
  }
}

template <class Problem>
const char* Query(void (*)(Problem), Properties& found) {
  found = emulated;
  return nullptr;
}

template <class Problem>
const char* Launch(void (*kernel)(Problem), const Shape& shape, const Problem& problem, const Properties&, void*) {
  if (shape.shared_bytes > static_cast<unsigned>(emulated.shared_limit)) return "too much shared memory";
  if (shape.blocks_x % shape.cluster != 0 || shape.blocks_y > 65535) return "invalid configuration";
  last_shape = shape;
  ++launches;
  for (unsigned y = 0; y < shape.blocks_y; ++y)
    for (unsigned x = 0; x < shape.blocks_x; x += shape.cluster)
      fibers::RunCluster({x, y, shape.cluster, shape.threads, shape.shared_bytes, launches % 2 == 0},
                         [&] { kernel(problem); });
  return nullptr;
}

}  // namespace device
}  // namespace hra
