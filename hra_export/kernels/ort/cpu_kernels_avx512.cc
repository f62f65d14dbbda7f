// The kernels for AVX-512 (F, BW, DQ, VL); this file alone is compiled for it.

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes its own headers' undefined vectors, which the instructions overwrite, for uninitialized variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "cpu_elements.h"
#include "cpu_tiles.h"

namespace hra::cpu {
namespace {

struct Simd {
  using Vec = __m512;
  static constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;  // 24 sums in 32 registers
  static constexpr int kMultiplyRows = 6;

  static Vec Zero() { return _mm512_setzero_ps(); }
  static Vec Set(float value) { return _mm512_set1_ps(value); }
  static Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec MulAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static float Widen(float value) { return value; }
  static float Widen(Half value) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(value.bits))); }
  static float Widen(BFloat16 value) { return Widened(value); }

  static Vec Wide(__m256i half, Half) { return _mm512_cvtph_ps(half); }
  static Vec Wide(__m256i half, BFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static __m256i Narrow(Vec wide, Half) { return _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT); }
  static __m256i Narrow(Vec wide, BFloat16) {
    const __m512i bits = _mm512_castps_si512(wide), one = _mm512_set1_epi32(1);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), is_odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
  }

  static __mmask16 First(int count) { return static_cast<__mmask16>((1U << count) - 1U); }
  static Vec Load(const float* from) { return _mm512_loadu_ps(from); }
  static Vec LoadFirst(const float* from, int count) { return _mm512_maskz_loadu_ps(First(count), from); }
  static void Store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
  static void StoreFirst(float* to, Vec value, int count) { _mm512_mask_storeu_ps(to, First(count), value); }
  template <class E>
  static Vec Load(const E* from) {
    return Wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), E{});
  }
  template <class E>
  static Vec LoadFirst(const E* from, int count) {
    return Wide(_mm256_maskz_loadu_epi16(First(count), from), E{});
  }
  template <class E>
  static void Store(E* to, Vec value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), Narrow(value, E{}));
  }
  template <class E>
  static void StoreFirst(E* to, Vec value, int count) {
    _mm256_mask_storeu_epi16(to, First(count), Narrow(value, E{}));
  }

  static __m128 LoadFour(const float* from) { return _mm_loadu_ps(from); }
  static __m128 LoadFour(const Half* from) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static __m128 LoadFour(const BFloat16* from) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
  }

  // 16 rows of 4 → 4 columns of 16. A quarter of a vector takes a row; 4 × 4 blocks are transposed in the quarters.
  template <class E>
  static void PackFour(const E* from, int64_t stride, float* panel) {
    __m512 row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = _mm512_castps128_ps512(LoadFour(from + i * stride));
      row[i] = _mm512_insertf32x4(row[i], LoadFour(from + (i + 4) * stride), 1);
      row[i] = _mm512_insertf32x4(row[i], LoadFour(from + (i + 8) * stride), 2);
      row[i] = _mm512_insertf32x4(row[i], LoadFour(from + (i + 12) * stride), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpacklo_ps(row[2], row[3]);
    const __m512 c = _mm512_unpackhi_ps(row[0], row[1]), d = _mm512_unpackhi_ps(row[2], row[3]);
    _mm512_storeu_ps(panel, _mm512_shuffle_ps(a, b, 0x44));
    _mm512_storeu_ps(panel + 16, _mm512_shuffle_ps(a, b, 0xEE));
    _mm512_storeu_ps(panel + 32, _mm512_shuffle_ps(c, d, 0x44));
    _mm512_storeu_ps(panel + 48, _mm512_shuffle_ps(c, d, 0xEE));
  }

  // t[c] += the sum of the lanes of sums[c].
  static void AddSums(const Vec (&sums)[kPanelColumns], float* t) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(t, _mm_add_ps(_mm_loadu_ps(t), quarter));
  }
};

}  // namespace

constexpr Instructions kAvx512{"avx512", Simd::kLanes, Tiles<Simd, float>::Table(), Tiles<Simd, Half>::Table(),
                           Tiles<Simd, BFloat16>::Table()};

}  // namespace hra::cpu
