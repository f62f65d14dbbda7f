// V = M Uᵀ: a Householder chain's V needs no more than r · r numbers beside U.
//
// The rows of V are sums of the columns of U, for every chain (compact WY form, Schreiber and Van Loan 1989). Where U is
// at hand M says the same as V with r / d of its bytes. A graph holds U and V alone; M is found from them.
//
// Letters: d features, r rank.
#pragma once

#include <cstdint>
#include <vector>

namespace hra::cpu {

// How far M Uᵀ may be from V, and how large the terms of its sums, |M| |Uᵀ|, may be, as parts of the largest |V| of the
// row. Of float32 chains, among them pairs of nearly equal vectors, the residual is at most 1.4 · 2⁻²² (r = 8 to 128,
// d = 576 to 4096) and the terms 4: as exact as V, which is rounded itself.
constexpr double kResidual = 0x1p-20;
constexpr double kTerms = 8;

// M, (r, r), for U (d, r) and V (r, d); empty if there is none within the limits above, or if it would not be shorter
// than half of V. Sums are in float64.
std::vector<float> Coefficients(const float* u, const float* v, int64_t d, int64_t r);

}  // namespace hra::cpu
