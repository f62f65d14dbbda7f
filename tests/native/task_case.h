// A task with random numbers, in blocks of exactly its size, and what the reflection of it is in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "task.h"

namespace check {

using hra::Type;

inline size_t SizeOf(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// Significant bits, and the exponent of the smallest normal number.
inline int BitsOf(Type type) { return type == Type::kFloat32 ? 24 : type == Type::kFloat16 ? 11 : 8; }
inline int LeastExponent(Type type) { return type == Type::kFloat16 ? -14 : -126; }

// The nearest number of the type, even where two are: by the definition, on the scale of the last place.
inline double Rounded(Type type, double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent = 0;
  std::frexp(value, &exponent);  // 2^(exponent − 1) ≤ |value| < 2^exponent
  const int place = std::max(exponent - 1, LeastExponent(type)) - BitsOf(type) + 1;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -place)), place);
  const double beyond = std::ldexp(1.0, type == Type::kFloat16 ? 16 : 128);
  return std::fabs(rounded) >= beyond ? std::copysign(INFINITY, value) : rounded;
}

// By the bits' meaning, with no more than ldexp.
inline double Decode(Type type, const void* data, int64_t i) {
  if (type == Type::kFloat32) {
    float value;
    std::memcpy(&value, static_cast<const char*>(data) + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(data) + 2 * i, 2);
  const int kept = BitsOf(type) - 1, top = (1 << (15 - kept)) - 1, exponent = bits >> kept & top;
  const int fraction = bits & ((1 << kept) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == top) return fraction == 0 ? sign * INFINITY : NAN;
  const int implied = exponent == 0 ? 0 : 1 << kept;
  return sign * std::ldexp(fraction + implied, std::max(exponent, 1) - 1 + LeastExponent(type) - kept);
}

// `value` must be a number of the type.
inline void Encode(Type type, double value, void* data, int64_t i) {
  if (type == Type::kFloat32) {
    const auto number = static_cast<float>(value);
    std::memcpy(static_cast<char*>(data) + 4 * i, &number, 4);
    return;
  }
  const int kept = BitsOf(type) - 1, top = (1 << (15 - kept)) - 1;
  const double magnitude = std::fabs(value);
  uint16_t bits = 0;
  if (std::isinf(value)) {
    bits = static_cast<uint16_t>(top << kept);
  } else if (magnitude > 0) {
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int biased = std::max(exponent - 1 - LeastExponent(type) + 1, 0);
    const int place = std::max(exponent - 1, LeastExponent(type)) - kept;
    const auto steps = static_cast<int>(std::ldexp(magnitude, -place));
    bits = static_cast<uint16_t>(biased == 0 ? steps : (biased << kept) | (steps - (1 << kept)));
  }
  bits = static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
  std::memcpy(static_cast<char*>(data) + 2 * i, &bits, 2);
}

struct Shape {
  Type type;
  int64_t rows, features;
  std::vector<int64_t> ranks;     // of the group's members
  int64_t adapters = 0;           // 0: no index
  int64_t rows_per_index = 1;
  bool is_chain = false;          // V = M Uᵀ with a triangular M, as of a Householder chain

  std::string Text() const {
    const char* name = type == Type::kFloat32 ? "float32" : type == Type::kFloat16 ? "float16" : "bfloat16";
    std::string text = std::string(name) + " n=" + std::to_string(rows) + " d=" + std::to_string(features) + " r=";
    for (const int64_t rank : ranks) text += std::to_string(rank) + ",";
    return text + " a=" + std::to_string(adapters) + " t=" + std::to_string(rows_per_index) +
           (is_chain ? " chain" : "");
  }
};

// Memory that ends where its last element does, and starts beside alignment.
class Block {
 public:
  Block(int64_t elements, size_t size)
      : size_(size), bytes_(static_cast<size_t>(elements + 1) * size), data_(new char[bytes_]) {
    std::memset(data_.get(), 0x5A, bytes_);
  }
  char* Get() { return data_.get() + size_; }
  const char* Get() const { return data_.get() + size_; }
  size_t Bytes() const { return bytes_ - size_; }
  void Spoil() { std::memset(data_.get(), 0x5A, bytes_); }
  bool IsFrontKept() const {
    for (size_t i = 0; i < size_; ++i)
      if (data_[i] != 0x5A) return false;
    return true;
  }

 private:
  size_t size_, bytes_;
  std::unique_ptr<char[]> data_;
};

class Case {
 public:
  Case(const Shape& shape, uint32_t seed)
      : shape_(shape), random_(seed), x_(shape.rows * shape.features, SizeOf(shape.type)) {
    Fill(&x_, shape.rows * shape.features, 1.0);
    const int64_t adapters = std::max<int64_t>(shape.adapters, 1), d = shape.features;
    for (const int64_t rank : shape.ranks) {
      u_.emplace_back(adapters * d * rank, SizeOf(shape.type));
      v_.emplace_back(adapters * d * rank, SizeOf(shape.type));
      y_.emplace_back(shape.rows * d, SizeOf(shape.type));
      // Y is then about as large as X, and half of it comes from the factors.
      Fill(&u_.back(), adapters * d * rank, 1.0 / std::sqrt(static_cast<double>(d)));
      Fill(&v_.back(), adapters * d * rank, 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(rank, 1))));
      if (shape.is_chain) FillChain(rank);
    }
    if (shape.adapters > 0) {
      for (int64_t i = 0; i * shape.rows_per_index < shape.rows; ++i) {
        index_.push_back(static_cast<int64_t>(random_() % static_cast<uint32_t>(shape.adapters)));
      }
    }
    for (size_t i = 0; i < shape.ranks.size(); ++i) {
      members_.push_back({u_[i].Get(), v_[i].Get(), y_[i].Get(), shape.ranks[i], adapters});
    }
  }

  hra::Task Task() const {
    return {shape_.type,
            x_.Get(),
            shape_.rows,
            shape_.features,
            shape_.adapters > 0 ? index_.data() : nullptr,
            shape_.adapters > 0 ? shape_.rows_per_index : shape_.rows,
            members_.data(),
            static_cast<int64_t>(members_.size())};
  }

  const Shape& GetShape() const { return shape_; }
  Block& X() { return x_; }
  std::vector<Block>& U() { return u_; }
  std::vector<Block>& V() { return v_; }
  std::vector<Block>& Y() { return y_; }
  std::vector<int64_t>& Index() { return index_; }

  struct Value {
    double y;      // X + (X U) V
    double terms;  // |X| + (|X| |U|) |V|
    double most;   // |X| + (|X| |U|) times the largest |V| of each row
  };

  // Of one member, (n, d).
  std::vector<Value> Expected(size_t member) const {
    const int64_t d = shape_.features, rank = shape_.ranks[member];
    const std::vector<double> x = Decoded(x_, shape_.rows * d);
    const int64_t factors = std::max<int64_t>(shape_.adapters, 1) * d * rank;
    const std::vector<double> u = Decoded(u_[member], factors), v = Decoded(v_[member], factors);
    std::vector<Value> values;
    std::vector<Value> t(static_cast<size_t>(rank));
    std::vector<double> largest(v.size() / static_cast<size_t>(std::max<int64_t>(d, 1)));
    for (size_t i = 0; i < v.size(); ++i) largest[i / d] = std::max(largest[i / d], std::fabs(v[i]));
    for (int64_t n = 0; n < shape_.rows; ++n) {
      const int64_t base = (index_.empty() ? 0 : index_[n / shape_.rows_per_index]) * d * rank;
      for (auto& each : t) each = {0, 0, 0};
      for (int64_t k = 0; k < d; ++k)
        for (int64_t j = 0; j < rank; ++j) {
          const double product = x[n * d + k] * u[base + k * rank + j];
          t[j].y += product;
          t[j].terms += std::fabs(product);
        }
      for (int64_t i = 0; i < d; ++i) {
        Value value{x[n * d + i], std::fabs(x[n * d + i]), std::fabs(x[n * d + i])};
        for (int64_t j = 0; j < rank; ++j) {
          value.y += t[j].y * v[base + j * d + i];
          value.terms += t[j].terms * std::fabs(v[base + j * d + i]);
          value.most += t[j].terms * largest[base / d + j];
        }
        values.push_back(value);
      }
    }
    return values;
  }

 private:
  // V of the last member: M Uᵀ, rounded once. M is the upper triangle of −2 on the diagonal, and beside it at random.
  void FillChain(int64_t rank) {
    const int64_t d = shape_.features;
    const std::vector<double> u = Decoded(u_.back(), d * rank);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rank; ++i) {
      std::vector<double> row(static_cast<size_t>(d));
      for (int64_t j = i; j < rank; ++j) {
        const double m = i == j ? -2 : normal(random_);
        for (int64_t k = 0; k < d; ++k) row[k] += m * u[k * rank + j];
      }
      for (int64_t k = 0; k < d; ++k) Encode(shape_.type, Rounded(shape_.type, row[k]), v_.back().Get(), i * d + k);
    }
  }

  void Fill(Block* block, int64_t elements, double scale) {
    std::normal_distribution<double> normal(0.0, scale);
    for (int64_t i = 0; i < elements; ++i) {
      Encode(shape_.type, Rounded(shape_.type, normal(random_)), block->Get(), i);
    }
  }

  std::vector<double> Decoded(const Block& block, int64_t elements) const {
    std::vector<double> values;
    for (int64_t i = 0; i < elements; ++i) values.push_back(Decode(shape_.type, block.Get(), i));
    return values;
  }

  Shape shape_;
  std::mt19937 random_;
  Block x_;
  std::vector<Block> u_, v_, y_;
  std::vector<int64_t> index_;
  std::vector<hra::Member> members_;
};

}  // namespace check
