// The kernels for any machine: vectors of four floats, which are SSE2 on x86-64 and NEON on 64-bit ARM.

#include "cpu_elements.h"
#include "cpu_tiles.h"

namespace hra::cpu {
namespace {

#if defined(__GNUC__)
using Four = float __attribute__((vector_size(16)));
#else
struct Four {
  float lane[4];
  float& operator[](int i) { return lane[i]; }
  float operator[](int i) const { return lane[i]; }
};
inline Four operator+(Four a, Four b) { return {a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]}; }
inline Four operator*(Four a, Four b) { return {a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]}; }
#endif

struct Simd {
  using Vec = Four;
  static constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;  // 8 sums in 16 registers, without a fused product
  static constexpr int kMultiplyRows = 2;

  static Vec Zero() { return Set(0); }
  static Vec Set(float value) { return Vec{value, value, value, value}; }
  static Vec Add(Vec a, Vec b) { return a + b; }
  static Vec MulAdd(Vec a, Vec b, Vec c) { return a * b + c; }

  template <class E>
  static float Widen(E value) {
    return Widened(value);
  }
  static Vec Load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  static void Store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }
  template <class E>
  static Vec Load(const E* from) {
    return Vec{Widen(from[0]), Widen(from[1]), Widen(from[2]), Widen(from[3])};
  }
  template <class E>
  static void Store(E* to, Vec value) {
    StoreFirst(to, value, kLanes);
  }
  template <class E>
  static Vec LoadFirst(const E* from, int count) {
    float spare[kLanes] = {};
    for (int i = 0; i < count; ++i) spare[i] = Widen(from[i]);
    return Load(spare);
  }
  template <class E>
  static void StoreFirst(E* to, Vec value, int count) {
    for (int i = 0; i < count; ++i) Narrow(value[i], to + i);
  }

  // 4 rows of 4 → 4 columns of 4.
  template <class E>
  static void PackFour(const E* from, int64_t stride, float* panel) {
    for (int row = 0; row < 4; ++row)
      for (int column = 0; column < 4; ++column) panel[column * 4 + row] = Widen(from[row * stride + column]);
  }

  // t[c] += the sum of the lanes of sums[c].
  static void AddSums(const Vec (&sums)[kPanelColumns], float* t) {
    for (int c = 0; c < kPanelColumns; ++c) t[c] += (sums[c][0] + sums[c][1]) + (sums[c][2] + sums[c][3]);
  }
};

}  // namespace

constexpr Instructions kBaseline{"baseline", Simd::kLanes, Tiles<Simd, float>::Table(), Tiles<Simd, Half>::Table(),
                             Tiles<Simd, BFloat16>::Table()};

}  // namespace hra::cpu
