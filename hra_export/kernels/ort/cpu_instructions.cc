#include "cpu_instructions.h"

#include <cstring>
#include <initializer_list>

#if defined(_MSC_VER) && defined(HRA_X86)
#include <intrin.h>
#elif defined(HRA_X86)
#include <cpuid.h>
#endif

namespace hra::cpu {
namespace {

#if defined(HRA_X86) && defined(_MSC_VER)
// Bits of CPUID 7 (EBX) and 1 (ECX), with the registers that the system saves (XCR0).
bool Has(const char* name) {
  int basic[4], extended[4];
  __cpuid(basic, 1);
  __cpuidex(extended, 7, 0);
  constexpr int kFma = 1 << 12, kSaves = 1 << 27, kF16c = 1 << 29, kAvx2Bit = 1 << 5;
  constexpr unsigned kAvx512Bits = 1U << 16 | 1U << 17 | 1U << 30 | 1U << 31;
  if ((basic[2] & (kFma | kSaves | kF16c)) != (kFma | kSaves | kF16c)) return false;
  const auto saved = _xgetbv(0);
  const bool has_avx2 = (extended[1] & kAvx2Bit) != 0 && (saved & 6) == 6;
  const bool has_avx512 = (static_cast<unsigned>(extended[1]) & kAvx512Bits) == kAvx512Bits && (saved & 0xE6) == 0xE6;
  return std::strcmp(name, "avx2") == 0 ? has_avx2 : has_avx2 && has_avx512;
}
#elif defined(HRA_X86)
bool Has(const char* name) {
  // Not every compiler knows the name of F16C.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  const bool has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0) return has_avx2;
  return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Instructions* FindInstructions(const char* name) {
#ifdef HRA_X86
  for (const Instructions* each : {&kAvx512, &kAvx2})
    if (std::strcmp(each->name, name) == 0) return Has(name) ? each : nullptr;
#endif
  return std::strcmp(name, kBaseline.name) == 0 ? &kBaseline : nullptr;
}

const Instructions& BestInstructions() {
  static const Instructions& best = []() -> const Instructions& {
    for (const char* name : {"avx512", "avx2"})
      if (const Instructions* found = FindInstructions(name)) return *found;
    return kBaseline;
  }();
  return best;
}

}  // namespace hra::cpu
