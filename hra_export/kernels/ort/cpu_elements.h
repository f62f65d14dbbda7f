// Half-precision numbers, one at a time and without special instructions: for tails, and for machines without them.
#pragma once

#include <cstdint>
#include <cstring>

namespace hra::cpu {
namespace {

// IEEE binary16 and bfloat16, as bits.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float OfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float Widened(float value) { return value; }
inline float Widened(BFloat16 value) { return OfBits(uint32_t{value.bits} << 16); }

// The exponent is moved by 127 − 15; a product with 2¹¹² does so for subnormal numbers too, exactly.
inline float Widened(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000U} << 16, rest = uint32_t{value.bits & 0x7FFFU} << 13;
  const bool is_finite = (value.bits & 0x7C00U) != 0x7C00U;
  const uint32_t magnitude = is_finite ? BitsOf(OfBits(rest) * 0x1p112f) : rest | 0x7F800000U;
  return OfBits(sign | magnitude);
}

inline void Narrow(float value, float* to) { *to = value; }

// To nearest even: half a unit of the last place, less one bit where the kept part is even. NaN stays NaN.
inline void Narrow(float value, BFloat16* to) {
  const uint32_t bits = BitsOf(value);
  const uint32_t rounded = value != value ? bits | 0x400000U : bits + 0x7FFFU + ((bits >> 16) & 1U);
  to->bits = static_cast<uint16_t>(rounded >> 16);
}

inline void Narrow(float value, Half* to) {
  const uint32_t bits = BitsOf(value), magnitude = bits & 0x7FFFFFFFU;
  uint32_t result;
  if (magnitude > 0x7F800000U) {
    result = 0x7E00U | (magnitude >> 13 & 0x3FFU);  // NaN, quiet
  } else if (magnitude >= 0x477FF000U) {
    result = 0x7C00U;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000U) {
    // Below 2⁻¹⁴, the sum with ½ has the unit of a subnormal number, 2⁻²⁴, in its last place: it rounds.
    result = BitsOf(OfBits(magnitude) + 0.5f) - BitsOf(0.5f);
  } else {
    result = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  }
  to->bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000U));
}

}  // namespace
}  // namespace hra::cpu
