// The kernels for AVX2, FMA and F16C; this file alone is compiled for them.

#include <immintrin.h>

#include "cpu_elements.h"
#include "cpu_tiles.h"

namespace hra::cpu {
namespace {

// Elements for `StoreFirst` and `LoadFirst` of types that no instruction masks.
template <class E>
struct Spare {
  E element[8] = {};
};

struct Simd {
  using Vec = __m256;
  static constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;  // 12 sums in 16 registers
  static constexpr int kMultiplyRows = 3;

  static Vec Zero() { return _mm256_setzero_ps(); }
  static Vec Set(float value) { return _mm256_set1_ps(value); }
  static Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec MulAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static float Widen(float value) { return value; }
  static float Widen(Half value) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(value.bits))); }
  static float Widen(BFloat16 value) { return Widened(value); }

  static Vec Wide(__m128i half, Half) { return _mm256_cvtph_ps(half); }
  static Vec Wide(__m128i half, BFloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static __m128i Narrow(Vec wide, Half) { return _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT); }
  static __m128i Narrow(Vec wide, BFloat16) {
    const __m256i bits = _mm256_castps_si256(wide), one = _mm256_set1_epi32(1);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), is_odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(wide, wide, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  }

  static __m256i First(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec Load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec LoadFirst(const float* from, int count) { return _mm256_maskload_ps(from, First(count)); }
  static void Store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
  static void StoreFirst(float* to, Vec value, int count) { _mm256_maskstore_ps(to, First(count), value); }
  template <class E>
  static Vec Load(const E* from) {
    return Wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), E{});
  }
  template <class E>
  static Vec LoadFirst(const E* from, int count) {
    Spare<E> spare;
    for (int i = 0; i < count; ++i) spare.element[i] = from[i];
    return Load(spare.element);
  }
  template <class E>
  static void Store(E* to, Vec value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), Narrow(value, E{}));
  }
  template <class E>
  static void StoreFirst(E* to, Vec value, int count) {
    Spare<E> spare;
    Store(spare.element, value);
    for (int i = 0; i < count; ++i) to[i] = spare.element[i];
  }

  static __m128 LoadFour(const float* from) { return _mm_loadu_ps(from); }
  static __m128 LoadFour(const Half* from) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static __m128 LoadFour(const BFloat16* from) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
  }

  // 8 rows of 4 → 4 columns of 8. Half a vector takes a row; 4 × 4 blocks are transposed in the halves.
  template <class E>
  static void PackFour(const E* from, int64_t stride, float* panel) {
    __m256 row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = _mm256_castps128_ps256(LoadFour(from + i * stride));
      row[i] = _mm256_insertf128_ps(row[i], LoadFour(from + (i + 4) * stride), 1);
    }
    const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpacklo_ps(row[2], row[3]);
    const __m256 c = _mm256_unpackhi_ps(row[0], row[1]), d = _mm256_unpackhi_ps(row[2], row[3]);
    _mm256_storeu_ps(panel, _mm256_shuffle_ps(a, b, 0x44));
    _mm256_storeu_ps(panel + 8, _mm256_shuffle_ps(a, b, 0xEE));
    _mm256_storeu_ps(panel + 16, _mm256_shuffle_ps(c, d, 0x44));
    _mm256_storeu_ps(panel + 24, _mm256_shuffle_ps(c, d, 0xEE));
  }

  // t[c] += the sum of the lanes of sums[c].
  static void AddSums(const Vec (&sums)[kPanelColumns], float* t) {
    const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(sums[0], sums[1]), _mm256_unpackhi_ps(sums[0], sums[1]));
    const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(sums[2], sums[3]), _mm256_unpackhi_ps(sums[2], sums[3]));
    const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    _mm_storeu_ps(t, _mm_add_ps(_mm_loadu_ps(t), quarter));
  }
};

}  // namespace

constexpr Instructions kAvx2{"avx2", Simd::kLanes, Tiles<Simd, float>::Table(), Tiles<Simd, Half>::Table(),
                         Tiles<Simd, BFloat16>::Table()};

}  // namespace hra::cpu
