// V = M Uᵀ: a Householder chain's V needs no more than r · r numbers beside U.
//
// The rows of V are sums of the columns of U, for every chain (compact WY form, Schreiber and Van Loan 1989). Where U
// is at hand M says the same as V with r / d of its bytes. A graph holds U and V alone; M is found from them, unless
// the columns of U depend on one another so much that its sums cancel.
//
// Letters: d features, r rank.
#pragma once

#include <cstdint>
#include <vector>

namespace hra::cpu {

// How far M Uᵀ may be from V, and how large the terms of its sums, |M| |Uᵀ|, may be, as parts of the largest |V| of the
// row. Measured of random chains and of pairs of nearly equal vectors, as HRA starts with (r = 8 to 128, d = 576 to
// 4096): at most 1.4 · 2⁻²² and 6. Chains of which all vectors are nearly equal are beyond the limits.
constexpr double kResidual = 0x1p-20;
constexpr double kTerms = 8;

// Beyond them, T M costs more than the bytes of V that it saves.
constexpr int64_t kLargestRank = 128, kLeastFeaturesPerRank = 4;

// M, (r, r), for U (d, r) and V (r, d); empty if there is none within the limits above. Sums are in float64; for
// d = 4096 they take 3 ms at r = 32 and 39 ms at r = 128 (Zen 5).
std::vector<float> Coefficients(const float* u, const float* v, int64_t d, int64_t r);

}  // namespace hra::cpu
