// One case for the kernels: its tensors, each on its own piece of the heap, its numbers in float64, and how far the
// kernels may be from them.
#pragma once

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "emulated_device.h"
#include "task.h"

using hra::BFloat16;
using hra::Half;
using hra::Type;

struct Case {
  Type type;
  int64_t features;
  std::vector<int64_t> ranks;
  int64_t rows;
  std::vector<int64_t> index = {};  // rows / size of it share an entry
  int64_t adapters = 1;
  int shift = 0;  // elements by which every tensor misses its alignment
};

// The type's unit roundoff, half its smallest number, and what is lost when X U goes to the tensor cores in two terms.
template <class T>
struct Precision;
template <>
struct Precision<float> {
  static constexpr double kUnit = 0x1p-24, kSmallest = 0x1p-150, kSplit = 0;
};
template <>
struct Precision<Half> {
  static constexpr double kUnit = 0x1p-11, kSmallest = 0x1p-25, kSplit = 0x1p-22;
};
template <>
struct Precision<BFloat16> {
  static constexpr double kUnit = 0x1p-8, kSmallest = 0x1p-134, kSplit = 0x1p-16;
};

// A tensor on its own piece of the heap.
template <class T>
class Tensor {
 public:
  Tensor(int64_t count, int shift) : memory_(new T[count + shift]), data_(memory_.get() + shift), count_(count) {}

  void Fill(const std::function<float()>& next) {
    for (int64_t i = 0; i < count_; ++i) data_[i] = hra::device::FromFloat<T>(next());
  }

  T* data() const { return data_; }
  double operator[](int64_t i) const { return hra::device::ToFloat(data_[i]); }

 private:
  std::unique_ptr<T[]> memory_;
  T* data_;
  int64_t count_;
};

// One column of Y in float64, and the sum of what went into it without signs.
struct Exact {
  double value;
  double magnitude;
  double sum_of_v;
};

template <class T>
struct Operands {
  Tensor<T> x;
  std::vector<Tensor<T>> u, v, y;

  Operands(const Case& that, const std::function<float()>& next_x, const std::function<float()>& next_uv)
      : x(that.rows * that.features, that.shift) {
    x.Fill(next_x);
    for (const int64_t rank : that.ranks) {
      u.emplace_back(that.adapters * that.features * rank, that.shift).Fill(next_uv);
      v.emplace_back(that.adapters * that.features * rank, that.shift).Fill(next_uv);
      y.emplace_back(that.rows * that.features, that.shift).Fill([] { return NAN; });
    }
  }
};

template <class T>
std::vector<Exact> ExactRow(const Case& that, const Operands<T>& of, size_t member, int64_t row, int64_t adapter) {
  const int64_t d = that.features;
  const int64_t rank = that.ranks[member];
  const int64_t base = adapter * d * rank;
  std::vector<double> xu(rank), size(rank);
  for (int64_t k = 0; k < d; ++k)
    for (int64_t j = 0; j < rank; ++j) {
      const double term = of.x[row * d + k] * of.u[member][base + k * rank + j];
      xu[j] += term;
      size[j] += std::fabs(term);
    }
  std::vector<Exact> exact(d);
  for (int64_t c = 0; c < d; ++c) {
    exact[c] = {of.x[row * d + c], 0, 0};
    for (int64_t j = 0; j < rank; ++j) {
      const double v = of.v[member][base + j * d + c];
      exact[c].value += xu[j] * v;
      exact[c].magnitude += size[j] * std::fabs(v);
      exact[c].sum_of_v += std::fabs(v);
    }
  }
  return exact;
}

// How far Y may be off: float32 sums of d and r terms, the two terms of X U, one rounding to the type.
template <class T>
double Bound(const Exact& exact, int64_t features, int64_t rank) {
  using P = Precision<T>;
  const double of_terms = (features + rank + 4) * 0x1p-24 + P::kSplit;
  const double in_sums = of_terms * exact.magnitude + P::kSmallest * exact.sum_of_v;
  const double size = std::fabs(exact.value) + in_sums;
  return 1.01 * (in_sums + (P::kUnit + 0x1p-24) * size + P::kSmallest);
}
