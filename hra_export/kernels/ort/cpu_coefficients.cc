// Least squares: M (UᵀU) = V U, with a ridge that leaves alone what float32 can tell apart. Without one, equal vectors
// in a chain would make UᵀU singular.

#include "cpu_coefficients.h"

#include <algorithm>
#include <cmath>

namespace hra::cpu {
namespace {

constexpr double kRidge = 0x1p-44;  // of the squares of U's columns: a bias of at most 2⁻²³ M

using Matrix = std::vector<double>;  // (r, r), by rows

// UᵀU, its lower half, and V U. The inner loops are over neighbours in memory.
void Products(const float* u, const float* v, int64_t d, int64_t r, Matrix* gram, Matrix* product) {
  std::vector<double> row(static_cast<size_t>(r));
  for (int64_t k = 0; k < d; ++k) {
    std::copy(u + k * r, u + (k + 1) * r, row.begin());
    for (int64_t i = 0; i < r; ++i) {
      const double left = row[i], right = v[i * d + k];
      double* g = gram->data() + i * r;
      double* p = product->data() + i * r;
      for (int64_t j = 0; j <= i; ++j) g[j] += left * row[j];
      for (int64_t j = 0; j < r; ++j) p[j] += right * row[j];
    }
  }
}

// The lower factor L of L Lᵀ = A, in A's place. False if A is not positive.
bool Cholesky(Matrix* a, int64_t r) {
  double* l = a->data();
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = l[i * r + j];
      for (int64_t k = 0; k < j; ++k) sum -= l[i * r + k] * l[j * r + k];
      if (i == j && !(sum > 0)) return false;
      l[i * r + j] = i == j ? std::sqrt(sum) : sum / l[j * r + j];
    }
  return true;
}

// b ← b (L Lᵀ)⁻¹ for a row b.
void Solve(const Matrix& lower, int64_t r, double* b) {
  const double* l = lower.data();
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t k = 0; k < i; ++k) b[i] -= l[i * r + k] * b[k];
    b[i] /= l[i * r + i];
  }
  for (int64_t i = r; i-- > 0;) {
    for (int64_t k = i + 1; k < r; ++k) b[i] -= l[k * r + i] * b[k];
    b[i] /= l[i * r + i];
  }
}

// Whether M Uᵀ is V within `kResidual` and `kTerms`. A NaN is not.
bool Holds(const std::vector<float>& m, const float* u, const float* v, int64_t d, int64_t r) {
  const auto count = static_cast<size_t>(r);
  std::vector<double> transposed(count * count), sums(count), terms(count), off(count), most(count), largest(count);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) transposed[j * r + i] = m[i * r + j];
  for (int64_t k = 0; k < d; ++k) {
    std::fill(sums.begin(), sums.end(), 0.0);
    std::fill(terms.begin(), terms.end(), 0.0);
    for (int64_t j = 0; j < r; ++j) {
      const double factor = u[k * r + j];
      const double* column = transposed.data() + j * r;
      for (int64_t i = 0; i < r; ++i) sums[i] += column[i] * factor;
      for (int64_t i = 0; i < r; ++i) terms[i] += std::fabs(column[i] * factor);
    }
    for (int64_t i = 0; i < r; ++i) {
      const double wanted = v[i * d + k], residual = std::fabs(wanted - sums[i]);
      if (!std::isfinite(residual)) return false;
      off[i] = std::max(off[i], residual);
      most[i] = std::max(most[i], terms[i]);
      largest[i] = std::max(largest[i], std::fabs(wanted));
    }
  }
  for (int64_t i = 0; i < r; ++i)
    if (!(off[i] <= kResidual * largest[i] && most[i] <= kTerms * largest[i])) return false;
  return true;
}

}  // namespace

std::vector<float> Coefficients(const float* u, const float* v, int64_t d, int64_t r) {
  if (r == 0 || r > kLargestRank || kLeastFeaturesPerRank * r > d) return {};
  Matrix gram(static_cast<size_t>(r * r)), product(gram.size());
  Products(u, v, d, r, &gram, &product);
  for (int64_t i = 0; i < r; ++i) {
    double& square = gram[i * r + i];
    square = square == 0 ? 1 : square * (1 + kRidge);  // a column of zeros has coefficients 0
  }
  if (!Cholesky(&gram, r)) return {};
  for (int64_t i = 0; i < r; ++i) Solve(gram, r, product.data() + i * r);
  std::vector<float> m(product.begin(), product.end());
  if (!Holds(m, u, v, d, r)) return {};
  return m;
}

}  // namespace hra::cpu
