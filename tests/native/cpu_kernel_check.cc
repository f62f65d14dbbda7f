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
#include <string>
#include <vector>

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
    if (const auto* found = hra::FindInstructions(name)) all.push_back(found);
  return all;
}

// Sums of d, then of r + 1 terms in float32, in any order, are off by at most (terms + 1) · 2⁻²⁴ of the terms' sizes
// (Higham, "Accuracy and Stability", 4.2); a result that is rounded to the type, by half a unit in its last place.
double Tolerance(const Shape& shape, int64_t rank, const Case::Value& expected) {
  const double sums = static_cast<double>(shape.features + rank + 4) * 0x1p-24 * expected.terms;
  if (shape.type == Type::kFloat32) return sums;
  return sums + std::fabs(expected.y) * std::ldexp(1.0, -BitsOf(shape.type)) +
         std::ldexp(1.0, LeastExponent(shape.type) - BitsOf(shape.type));
}

void CompareMember(Case& task, size_t member, const std::vector<Case::Value>& expected, const std::string& where) {
  const Shape& shape = task.GetShape();
  for (size_t i = 0; i < expected.size(); ++i) {
    const double got = Decode(shape.type, task.Y()[member].Get(), static_cast<int64_t>(i));
    if (std::fabs(got - expected[i].y) <= Tolerance(shape, shape.ranks[member], expected[i])) continue;
    return Fail(where + ": member " + std::to_string(member) + ", element " + std::to_string(i) + ": expected " +
                std::to_string(expected[i].y) + ", got " + std::to_string(got));
  }
}

std::vector<std::vector<char>> Outputs(Case& task) {
  std::vector<std::vector<char>> outputs;
  for (const Block& y : task.Y()) outputs.emplace_back(y.Get(), y.Get() + y.Bytes());
  return outputs;
}

// Packed factors give the same bits. Few rows read nothing else: U and V are not even there.
void CheckPacked(Case& task, const hra::cpu::Instructions& instructions, const std::vector<hra::Parallel>& pools,
                 const std::vector<std::vector<char>>& expected, const std::string& where) {
  hra::Task packed = task.Task();
  Block memory(hra::cpu::PackedBytes(packed) / 4, 4);
  hra::cpu::Pack(packed, memory.Get());
  std::vector<hra::Member> members(packed.members, packed.members + packed.count);
  for (hra::Member& member : members)
    if (packed.rows <= hra::cpu::kFewRows) member.u = member.v = nullptr;
  packed.members = members.data();
  for (const hra::Parallel& pool : pools) {
    for (Block& y : task.Y()) y.Spoil();
    const char* reason = hra::ReflectOnCpuWith(instructions, packed, pool, memory.Get());
    if (reason != nullptr || expected != Outputs(task)) Fail(where + ": other bits with packed factors");
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
    if (shape.adapters == 0) CheckPacked(task, *instructions, pools, first, where);
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
  const std::vector<hra::Parallel> pools{OneAfterTheOther(3), one.Parallel(), two.Parallel(), four.Parallel()};
  uint32_t seed = 0;
  for (const Shape& shape : FixedShapes()) CheckShape(shape, ++seed, pools);
  std::mt19937 random(20240517);
  for (int i = count > 1 ? std::atoi(arguments[1]) : 100; i > 0; --i) CheckShape(RandomShape(&random), ++seed, pools);
  for (const Type type : {Type::kFloat16, Type::kBFloat16}) {
    CheckEveryHalf(type);
    for (const double nudge : {1.0, 0.5, 1.5, 2.0}) CheckRounding(type, nudge);
  }
  CheckNanSpreads();
  CheckIndexRefused();
  for (const auto* instructions : AllInstructions()) std::printf("%s ", instructions->name);
  std::printf("%u shapes\n", seed);
  return failures == 0 ? 0 : 1;
}
