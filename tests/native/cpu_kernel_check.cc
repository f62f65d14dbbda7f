// Checks the reflection on the CPU against a loop in float64, with every set of instructions that the machine has.
//
//   cpu_kernel_check [CASES]     0: all hold; 1: one does not, and what is on stderr
//
// CASES random shapes beside the fixed ones; 100 by default.
//
// Meant to be built with sanitizers: every matrix is in a block of its own that ends where the matrix ends.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu_coefficients.h"
#include "cpu_instructions.h"
#include "cpu_packing.h"
#include "cpu_reflection.h"
#include "task_case.h"
#include "threads.h"

namespace check {
namespace {

int failures = 0;

void Fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  if (++failures > 20) std::exit(1);
}

std::vector<const hra::cpu::Instructions*> AllInstructions() {
  std::vector<const hra::cpu::Instructions*> all;
  for (const char* name : {"avx512", "avx2", "baseline"})
    if (const auto* found = hra::cpu::FindInstructions(name)) all.push_back(found);
  return all;
}

// Sums of d, then of r + 1 terms in float32, in any order, are off by at most (terms + 1) · 2⁻²⁴ of the terms' sizes
// (Higham, "Accuracy and Stability", 4.2); a result that is rounded to the type, by half a unit in its last place.
//
// With M in the place of V there are r more terms, of at most `kTerms` times the size of V's largest, and M Uᵀ is off.
double Tolerance(const Shape& shape, int64_t rank, const Case::Value& expected, bool has_coefficients) {
  const auto d = static_cast<double>(shape.features), r = static_cast<double>(rank);
  const double sums = has_coefficients
                          ? ((d + 2 * r + 8) * 0x1p-24 * hra::cpu::kTerms + hra::cpu::kResidual) * expected.most
                          : (d + r + 4) * 0x1p-24 * expected.terms;
  if (shape.type == Type::kFloat32) return sums;
  return sums + std::fabs(expected.y) * std::ldexp(1.0, -BitsOf(shape.type)) +
         std::ldexp(1.0, LeastExponent(shape.type) - BitsOf(shape.type));
}

void CompareMember(Case& task, size_t member, const std::vector<Case::Value>& expected, const std::string& where,
                   bool has_coefficients = false) {
  const Shape& shape = task.GetShape();
  for (size_t i = 0; i < expected.size(); ++i) {
    const double got = Decode(shape.type, task.Y()[member].Get(), static_cast<int64_t>(i));
    const double tolerance = Tolerance(shape, shape.ranks[member], expected[i], has_coefficients);
    if (std::fabs(got - expected[i].y) <= tolerance) continue;
    return Fail(where + ": member " + std::to_string(member) + ", element " + std::to_string(i) + ": expected " +
                std::to_string(expected[i].y) + ", got " + std::to_string(got));
  }
}

std::vector<std::vector<char>> Outputs(Case& task) {
  std::vector<std::vector<char>> outputs;
  for (const Block& y : task.Y()) outputs.emplace_back(y.Get(), y.Get() + y.Bytes());
  return outputs;
}

// M Uᵀ is V within `kResidual`. The matrices are of float32.
void CheckProduct(const void* u, const void* v, const float* m, int64_t d, int64_t r) {
  for (int64_t i = 0; i < r; ++i) {
    double largest = 0, off = 0;
    for (int64_t k = 0; k < d; ++k) {
      double sum = 0;
      for (int64_t j = 0; j < r; ++j) sum += double{m[i * r + j]} * Decode(Type::kFloat32, u, k * r + j);
      const double wanted = Decode(Type::kFloat32, v, i * d + k);
      largest = std::max(largest, std::fabs(wanted));
      off = std::max(off, std::fabs(sum - wanted));
    }
    if (!(off <= hra::cpu::kResidual * largest)) {
      return Fail("row " + std::to_string(i) + " of M times U is off by " + std::to_string(off / largest));
    }
  }
}

// Packed factors give the same bits, or right ones where M is found: of float32 chains, and of those alone, unless r is
// large. Few rows read nothing else: U and V are not even there.
void CheckPacked(Case& task, const hra::cpu::Instructions& instructions, const std::vector<hra::Parallel>& pools,
                 const std::vector<std::vector<Case::Value>>& expected, std::vector<std::vector<char>> first,
                 const std::string& where) {
  const Shape& shape = task.GetShape();
  hra::Task packed = task.Task();
  const hra::cpu::Packing packing(packed);
  constexpr int64_t kLine = 64;
  std::vector<char> memory(static_cast<size_t>(packing.Bytes() + kLine));
  void* start = memory.data();
  size_t space = memory.size();
  std::align(kLine, static_cast<size_t>(packing.Bytes()), start, space);
  const hra::cpu::PackedFactors factors = packing.To(start);
  std::vector<hra::Member> members(packed.members, packed.members + packed.count);
  const bool is_few = packed.rows <= hra::cpu::kFewRows;
  for (hra::Member& member : members)
    if (is_few) member.u = member.v = nullptr;
  packed.members = members.data();
  for (const hra::Parallel& pool : pools) {
    for (Block& y : task.Y()) y.Spoil();
    const char* reason = hra::ReflectOnCpuWith(instructions, packed, pool, &factors);
    if (reason != nullptr) return Fail(where + " packed: " + reason);
    const std::vector<std::vector<char>> got = Outputs(task);
    for (size_t i = 0; i < members.size(); ++i) {
      const int64_t rank = shape.ranks[i];
      const bool has_coefficients = factors.members[i].m != nullptr;
      const bool is_small =
          rank > 0 && rank <= hra::cpu::kLargestRank && hra::cpu::kLeastFeaturesPerRank * rank <= shape.features;
      const bool is_chain = shape.type == Type::kFloat32 && shape.is_chain && is_small;
      if (has_coefficients != is_chain) Fail(where + (is_chain ? ": M is not found" : ": M is found where none is"));
      const float* m = factors.members[i].m;
      if (has_coefficients) CheckProduct(task.U()[i].Get(), task.V()[i].Get(), m, shape.features, rank);
      if (!has_coefficients && got[i] != first[i]) Fail(where + ": other bits with packed factors");
      if (has_coefficients && is_few) CompareMember(task, i, expected[i], where + " M", true);
      if (has_coefficients && &pool != &pools[0] && got[i] != first[i]) Fail(where + ": M's bits depend on threads");
    }
    first = got;
  }
}

// Right with the first pool, and the same to the bit with all others.
void CheckShape(const Shape& shape, uint32_t seed, const std::vector<hra::Parallel>& pools) {
  Case task(shape, seed);
  std::vector<std::vector<Case::Value>> expected;
  for (size_t i = 0; i < shape.ranks.size(); ++i) expected.push_back(task.Expected(i));
  for (const auto* instructions : AllInstructions()) {
    const std::string where = std::string(instructions->name) + " " + shape.Text();
    std::vector<std::vector<char>> first;
    for (const hra::Parallel& pool : pools) {
      for (Block& y : task.Y()) y.Spoil();
      const char* reason = hra::ReflectOnCpuWith(*instructions, task.Task(), pool);
      if (reason != nullptr) return Fail(where + ": " + reason);
      if (first.empty()) {
        first = Outputs(task);
        for (size_t i = 0; i < expected.size(); ++i) CompareMember(task, i, expected[i], where);
      } else if (first != Outputs(task)) {
        Fail(where + ": other bits with " + std::to_string(pool.threads) + " threads");
      }
      for (const Block& y : task.Y())
        if (!y.IsFrontKept()) Fail(where + ": wrote in front of Y");
    }
    if (shape.adapters == 0) CheckPacked(task, *instructions, pools, expected, first, where);
  }
}

std::vector<Shape> FixedShapes() {
  std::vector<Shape> shapes;
  for (const Type type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16}) {
    for (const int64_t rank : {0, 1, 2, 8, 17, 32, 64, 128})
      for (const int64_t rows : {1, 3, 29}) shapes.push_back({type, rows, rank % 2 == 0 ? 72 : 83, {rank}});
    shapes.push_back({type, 0, 16, {8}});
    shapes.push_back({type, 5, 0, {8}});
    shapes.push_back({type, 2, 1700, {8, 32}});    // several pieces and strips
    shapes.push_back({type, 130, 800, {8, 3}});    // two depths of panels, long blocks
    shapes.push_back({type, 1, 40, {1200}});
    shapes.push_back({type, 14, 24, {70, 0, 5}});  // two sets of panels
    shapes.push_back({type, 6, 96, {8, 8, 8}, 4, 1});
    shapes.push_back({type, 60, 33, {4, 9}, 3, 15});
    shapes.push_back({type, 0, 33, {4}, 3, 0});
    for (const int64_t rows : {1, 2, 12, 13})
      for (const int64_t d : {64, 83, 576, 1700}) shapes.push_back({type, rows, d, {8, 0, 32, 3}, 0, 1, true});
    shapes.push_back({type, 12, 150, {19}, 0, 1, true});       // a rank that is padded, and little else
    shapes.push_back({type, 2, 640, {128, 129}, 0, 1, true});  // the largest with M, and one beyond
  }
  return shapes;
}

Shape RandomShape(std::mt19937* random) {
  const auto draw = [random](int64_t least, int64_t most) {
    return least + static_cast<int64_t>((*random)() % static_cast<uint32_t>(most - least + 1));
  };
  const Type types[] = {Type::kFloat32, Type::kFloat16, Type::kBFloat16};
  Shape shape{types[draw(0, 2)], draw(1, 40), draw(1, 150), {}};
  const int64_t members = draw(0, 2) > 0 ? 1 : draw(2, 8);
  for (int64_t i = 0; i < members; ++i) shape.ranks.push_back(draw(0, draw(0, 3) > 0 ? 20 : 70));
  if (draw(0, 2) == 0) {
    shape.adapters = draw(1, 4);
    shape.rows_per_index = draw(1, 6);
    shape.rows = shape.rows_per_index * draw(1, 12);
  } else {
    shape.is_chain = draw(0, 1) == 0;
  }
  return shape;
}

// X comes through as it is at r = 0: all 2¹⁶ of a half type, NaN as NaN.
void CheckEveryHalf(Type type) {
  for (const auto* instructions : AllInstructions()) {
    Case task({type, 1, 1 << 16, {0}}, 1);
    for (int64_t i = 0; i < 1 << 16; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      std::memcpy(task.X().Get() + 2 * i, &bits, 2);
    }
    hra::ReflectOnCpuWith(*instructions, task.Task(), OneAfterTheOther(1));
    for (int64_t i = 0; i < 1 << 16; ++i) {
      const double x = Decode(type, task.X().Get(), i), y = Decode(type, task.Y()[0].Get(), i);
      if (std::isnan(x) ? !std::isnan(y) : std::memcmp(task.X().Get() + 2 * i, task.Y()[0].Get() + 2 * i, 2) != 0) {
        return Fail(std::string(instructions->name) + ": r = 0 changes " + std::to_string(i));
      }
    }
  }
}

// Y = X + V, exact in float32, lies on every tie of the type and beside it: `nudge` halves of a unit in the last place.
void CheckRounding(Type type, double nudge) {
  const int64_t d = 4003;
  for (const auto* instructions : AllInstructions()) {
    Case task({type, 1, d, {1}}, 2);
    std::mt19937 random(3);
    for (int64_t i = 0; i < d; ++i) {
      const double significand = 1 + (random() % (1U << (BitsOf(type) - 1))) * std::ldexp(1.0, 1 - BitsOf(type));
      const unsigned exponents = type == Type::kFloat16 ? 28 : 200;
      const int exponent = static_cast<int>(random() % exponents) - (type == Type::kFloat16 ? 12 : 100);
      const double sign = random() % 2 == 0 ? 1 : -1;
      Encode(type, i == 0 ? 1 : sign * std::ldexp(significand, exponent), task.X().Get(), i);
      Encode(type, i == 0 ? 1 : 0, task.U()[0].Get(), i);
      const double v = sign * std::ldexp(nudge, exponent - BitsOf(type));
      Encode(type, i == 0 ? 0 : Rounded(type, v), task.V()[0].Get(), i);
    }
    hra::ReflectOnCpuWith(*instructions, task.Task(), OneAfterTheOther(1));
    for (int64_t i = 0; i < d; ++i) {
      const double x = Decode(type, task.X().Get(), i), v = Decode(type, task.V()[0].Get(), i);
      const double got = Decode(type, task.Y()[0].Get(), i), expected = Rounded(type, x + v);
      if (got != expected) {
        return Fail(std::string(instructions->name) + ": " + std::to_string(x) + " + " + std::to_string(v) +
                    " became " + std::to_string(got) + ", not " + std::to_string(expected));
      }
    }
  }
}

void CheckNanSpreads() {
  for (const Type type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16})
    for (const auto* instructions : AllInstructions())
      for (const int64_t rows : {2, 20}) {
        Case task({type, rows, 37, {3}}, 4);
        const uint32_t nan = type == Type::kFloat32 ? 0x7FFFFFFFU : 0x7FFFU;  // rounding up would make it zero
        std::memcpy(task.X().Get() + 37 * SizeOf(type), &nan, SizeOf(type));  // first of the second row
        hra::ReflectOnCpuWith(*instructions, task.Task(), OneAfterTheOther(1));
        for (int64_t i = 0; i < 74; ++i)
          if (std::isnan(Decode(type, task.Y()[0].Get(), i)) != (i >= 37)) Fail("a NaN is not its row, and that alone");
      }
}

// A chain's U and V, (576, 8), in which `equal` vectors that follow one another are the first of them, and a little of
// another.
struct Chain {
  static constexpr int64_t kFeatures = 576, kRank = 8;
  std::vector<float> u, v;

  explicit Chain(double difference, int64_t equal = 2) : u(kFeatures * kRank), v(kFeatures * kRank) {
    std::mt19937 random(6);
    std::normal_distribution<double> normal(0, 1 / std::sqrt(static_cast<double>(kFeatures)));
    std::vector<double> rows(kFeatures * kRank);  // of Uᵀ
    for (int64_t i = 0; i < kRank; ++i)
      for (int64_t k = 0; k < kFeatures; ++k) {
        double& at = rows[i * kFeatures + k];
        at = i % equal == 0 ? normal(random) : rows[(i - 1) * kFeatures + k] + difference * normal(random);
      }
    for (int64_t i = 0; i < kRank; ++i) {
      double length = 0;
      for (int64_t k = 0; k < kFeatures; ++k) length += rows[i * kFeatures + k] * rows[i * kFeatures + k];
      for (int64_t k = 0; k < kFeatures; ++k) rows[i * kFeatures + k] /= std::sqrt(length);
    }
    // I + U V = H_1 … H_8 with H_i = I − 2 u_i u_iᵀ: row i of V is −2 u_iᵀ H_(i+1) … H_8.
    for (int64_t i = 0; i < kRank; ++i) {
      std::vector<double> row(rows.begin() + i * kFeatures, rows.begin() + (i + 1) * kFeatures);
      for (double& each : row) each *= -2;
      for (int64_t j = i + 1; j < kRank; ++j) {
        double dot = 0;
        for (int64_t k = 0; k < kFeatures; ++k) dot += row[k] * rows[j * kFeatures + k];
        for (int64_t k = 0; k < kFeatures; ++k) row[k] -= 2 * dot * rows[j * kFeatures + k];
      }
      for (int64_t k = 0; k < kFeatures; ++k) v[i * kFeatures + k] = static_cast<float>(row[k]);
      for (int64_t k = 0; k < kFeatures; ++k) u[k * kRank + i] = static_cast<float>(rows[i * kFeatures + k]);
    }
  }

  bool HasCoefficients() const {
    const std::vector<float> m = hra::cpu::Coefficients(u.data(), v.data(), kFeatures, kRank);
    if (!m.empty()) CheckProduct(u.data(), v.data(), m.data(), kFeatures, kRank);
    return !m.empty();
  }
};

// Chains of pairs have M, however near; those whose sums cancel and what is off by more than rounding have none.
void CheckCoefficients() {
  for (const double difference : {0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0}) {
    if (!Chain(difference).HasCoefficients()) Fail("no M for pairs that differ by " + std::to_string(difference));
  }
  if (Chain(0.1, Chain::kRank).HasCoefficients()) Fail("M of terms that cancel");
  for (const float off : {4e-6F, 1.0F, INFINITY, NAN}) {
    Chain chain(0.1);
    chain.v[1000] += off * *std::max_element(chain.v.begin() + 576, chain.v.begin() + 1152);
    if (chain.HasCoefficients()) Fail("M, and V is off by " + std::to_string(off));
  }
  Chain zeros(0.1);
  for (int64_t k = 0; k < Chain::kFeatures; ++k) zeros.u[k * Chain::kRank + 7] = 0;
  std::fill(zeros.v.begin(), zeros.v.end(), 0.0F);
  if (!zeros.HasCoefficients()) Fail("no M for V = 0");
  zeros.u[3] = NAN;
  if (zeros.HasCoefficients()) Fail("M, and U has a NaN");
}

void CheckIndexRefused() {
  for (const int64_t wrong : {int64_t{-1}, int64_t{3}, INT64_MAX, INT64_MIN}) {
    Case task({Type::kFloat32, 6, 16, {4, 4}, 3, 2}, 5);
    task.Index()[1] = wrong;
    const char* reason = hra::ReflectOnCpu(task.Task(), OneAfterTheOther(1));
    if (reason == nullptr) Fail("index " + std::to_string(wrong) + " is taken");
  }
}

}  // namespace
}  // namespace check

int main(int count, char** arguments) {
  using namespace check;
  Pool one(1), two(2), four(4);
  const std::vector<hra::Parallel> pools{OneAfterTheOther(16), one.Parallel(), two.Parallel(), four.Parallel()};
  uint32_t seed = 0;
  for (const Shape& shape : FixedShapes()) CheckShape(shape, ++seed, pools);
  std::mt19937 random(20240517);
  for (int i = count > 1 ? std::atoi(arguments[1]) : 100; i > 0; --i) CheckShape(RandomShape(&random), ++seed, pools);
  for (const Type type : {Type::kFloat16, Type::kBFloat16}) {
    CheckEveryHalf(type);
    for (const double nudge : {1.0, 0.5, 1.5, 2.0}) CheckRounding(type, nudge);
  }
  CheckNanSpreads();
  CheckCoefficients();
  CheckIndexRefused();
  for (const auto* instructions : AllInstructions()) std::printf("%s ", instructions->name);
  std::printf("%u shapes\n", seed);
  return failures == 0 ? 0 : 1;
}
