// Runs the CUDA kernels on the emulated device and compares with float64. Usage: check <section>, or none for all.
//
// Every case runs twice: on random numbers, within a bound that follows from the roundings; and on small integers, for
// which every sum is exact, so that Y must be the right number rounded once, to the bit. Buffers are as large as the
// tensors and not a byte more, and Y starts as NaN.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "exact.h"
// After the emulated device, whose place it would take.
#include "cuda_reflection.cu"

namespace {

int failures = 0;

void Expect(bool holds, const std::string& text) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", text.c_str());
}

std::string Describe(const Case& that) {
  const char* names[] = {"float32", "float16", "bfloat16"};
  std::string ranks;
  for (const int64_t rank : that.ranks) ranks += (ranks.empty() ? "" : ",") + std::to_string(rank);
  return std::string(names[static_cast<int>(that.type)]) + " n=" + std::to_string(that.rows) +
         " d=" + std::to_string(that.features) + " r=" + ranks + " entries=" + std::to_string(that.index.size()) +
         " shift=" + std::to_string(that.shift) + " compute " + std::to_string(hra::device::emulated.compute_major) +
         " cluster " + std::to_string(hra::device::last_shape.cluster);
}

template <class T>
const char* RunTask(const Case& that, const Operands<T>& of) {
  std::vector<hra::Member> members;
  for (size_t i = 0; i < that.ranks.size(); ++i)
    members.push_back({of.u[i].data(), of.v[i].data(), of.y[i].data(), that.ranks[i], that.adapters});
  const auto entries = static_cast<int64_t>(that.index.size());
  const hra::Task task = {that.type, of.x.data(),       that.rows,
                          that.features,                entries ? that.index.data() : nullptr,
                          entries ? that.rows / entries : 0, members.data(),
                          static_cast<int64_t>(members.size())};
  return hra::ReflectOnCuda(task, nullptr);
}

template <class T>
void Compare(const Case& that, const Operands<T>& of, bool integers) {
  const int64_t d = that.features;
  for (size_t member = 0; member < that.ranks.size(); ++member)
    for (int64_t row = 0; row < that.rows; ++row) {
      const auto entries = static_cast<int64_t>(that.index.size());
      const int64_t adapter = entries ? that.index[row / (that.rows / entries)] : 0;
      const bool known = adapter >= 0 && adapter < that.adapters;
      const auto exact = known ? ExactRow(that, of, member, row, adapter) : std::vector<Exact>(d);
      for (int64_t c = 0; c < d; ++c) {
        const double got = of.y[member][row * d + c];
        const float once = hra::device::ToFloat(hra::device::FromFloat<T>(static_cast<float>(exact[c].value)));
        const bool right = !known   ? std::isnan(got)
                           : integers ? got == once
                                      : std::fabs(got - exact[c].value) <= Bound<T>(exact[c], d, that.ranks[member]);
        Expect(right, Describe(that) + (integers ? " integers" : "") + ": member " + std::to_string(member) + " row " +
                          std::to_string(row) + " column " + std::to_string(c) + ": expected " +
                          std::to_string(known ? exact[c].value : NAN) + ", got " + std::to_string(got));
      }
    }
}

template <class T>
void RunAs(const Case& that) {
  std::mt19937 random(static_cast<unsigned>(that.features * 131 + that.rows));
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> small(-2, 2);
  std::uniform_int_distribution<int> sign(-1, 1);
  const auto of_unit_columns = [&] { return normal(random) / std::sqrt(static_cast<float>(that.features)); };
  const Operands<T> floats(that, [&] { return normal(random); }, of_unit_columns);
  const Operands<T> integers(
      that, [&] { return static_cast<float>(small(random)); }, [&] { return static_cast<float>(sign(random)); });
  for (const Operands<T>* operands : {&floats, &integers}) {
    const int before = hra::device::launches;
    const char* error = RunTask(that, *operands);
    Expect(error == nullptr, Describe(that) + ": " + (error ? error : ""));
    const int due = that.rows > 0 && that.features > 0 ? static_cast<int>((that.ranks.size() + 7) / 8) : 0;
    Expect(hra::device::launches - before == due, Describe(that) + ": not one launch");
    Compare(that, *operands, operands == &integers);
  }
}

void Run(const Case& that) {
  if (that.type == Type::kFloat32) RunAs<float>(that);
  if (that.type == Type::kFloat16) RunAs<Half>(that);
  if (that.type == Type::kBFloat16) RunAs<BFloat16>(that);
}

constexpr Type kTypes[] = {Type::kFloat32, Type::kFloat16, Type::kBFloat16};

// Ranks round the widths that the kernels cut them into, with and without clusters.
void CheckRanks() {
  for (const int major : {9, 8}) {
    hra::device::emulated.compute_major = major;
    for (const Type type : kTypes)
      for (const int64_t rank : {0, 1, 2, 8, 17, 32, 64, 128, 130})
        for (const int64_t rows : {1, 7}) Run({type, rank % 3 == 1 ? 131 : 136, {rank}, rows});
  }
}

// Rows and features round the sizes of tiles and slices; no rows, no features.
void CheckSizes() {
  for (const int major : {9, 8}) {
    hra::device::emulated.compute_major = major;
    for (const Type type : kTypes) {
      for (const int64_t rows : {0, 2, 3, 5, 16, 65}) Run({type, 70, {8}, rows});
      for (const int64_t features : {0, 1, 15, 129, 600, 1100}) Run({type, features, {6}, 3});
      for (const int64_t features : {1, 15, 129, 600, 1100}) Run({type, features, {6}, 9});
    }
  }
}

// Groups of several ranks; a group that takes two launches.
void CheckGroups() {
  for (const Type type : kTypes)
    for (const int64_t rows : {1, 20}) {
      Run({type, 144, {8, 8, 8}, rows});
      Run({type, 131, {2, 40, 0, 17}, rows});
    }
  Run({Type::kFloat16, 64, {1, 2, 3, 4, 5, 6, 7, 8, 9}, 1});
}

// An adapter for each row or for several; entries that name none.
void CheckRows() {
  for (const Type type : kTypes) {
    Run({type, 136, {8, 16}, 4, {2, 0, 1, 2}, 3});
    Run({type, 131, {5}, 21, {1, 0, 1}, 2});
    Run({type, 136, {8, 3}, 4, {1, -1, 2, 0}, 2});
    Run({type, 136, {8}, 12, {INT64_MIN, 0}, 1});
  }
}

// Tensors that begin at no more than their type's alignment.
void CheckAlignment() {
  for (const Type type : kTypes)
    for (const int64_t rows : {1, 3, 6}) Run({type, 136, {8}, rows, {}, 1, 1});
}

// On a small device rows fill it: tiles of more rows, and a block for all members.
void CheckFullDevice() {
  for (const int major : {9, 8}) {
    hra::device::emulated = {major, 1, 160 * 1024};
    for (const Type type : kTypes) {
      Run({type, 130, {8, 24}, 70});
      Run({type, 132, {24, 8}, 70});  // another block may be at the second member while this one is at the first
      Run({type, 132, {100, 8, 33}, 35});
      Expect(hra::device::last_shape.blocks_y == 1, "members were spread over a device that rows fill");
    }
  }
}

// What is not a number stays in its row, and where it is; what cannot be done is said.
void CheckEdges() {
  const auto one = [] { return 1.0f; };
  for (const int64_t rows : {3, 16}) {
    const Case that = {Type::kBFloat16, 96, {3}, rows};
    const Operands<BFloat16> of(that, one, one);
    of.x.data()[96 + 5] = hra::device::FromFloat<BFloat16>(INFINITY);
    Expect(RunTask(that, of) == nullptr, "a task with an infinite X failed");
    for (int64_t i = 0; i < rows * 96; ++i) {
      const double due = i / 96 == 1 ? INFINITY : 289;  // 1 + 96 · 3
      Expect(of.y[0][i] == hra::device::ToFloat(hra::device::FromFloat<BFloat16>(due)), "infinite X: wrong Y");
    }
  }
  Run({Type::kFloat32, 200, {6000}, 1});  // leaves no room for the slots of a cluster
  Case large = {Type::kFloat32, 8, {60000}, 1};
  Expect(RunTask(large, Operands<float>(large, one, one)) != nullptr, "a rank beyond shared memory was not refused");
  hra::device::emulated.compute_major = 7;
  Case small = {Type::kFloat32, 8, {1}, 1};
  Expect(RunTask(small, Operands<float>(small, one, one)) != nullptr, "compute capability 7 was not refused");
}

// Every float16 and bfloat16 is itself after a way through float32; ties go to the even neighbour.
void CheckFormats() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half half = {static_cast<uint16_t>(bits)};
    const BFloat16 brain = {static_cast<uint16_t>(bits)};
    const float from_half = hra::device::ToFloat(half);
    const float from_brain = hra::device::ToFloat(brain);
    Expect(std::isnan(from_half) || hra::device::FromFloat<Half>(from_half).bits == bits, "float16 changed");
    Expect(std::isnan(from_brain) || hra::device::FromFloat<BFloat16>(from_brain).bits == bits, "bfloat16 changed");
  }
  Expect(hra::device::ToFloat(hra::device::FromFloat<Half>(2049.0f)) == 2048.0f, "2049 in float16");
  Expect(hra::device::ToFloat(hra::device::FromFloat<BFloat16>(257.0f)) == 256.0f, "257 in bfloat16");
}

const std::pair<const char*, void (*)()> kSections[] = {
    {"formats", CheckFormats},     {"ranks", CheckRanks},  {"sizes", CheckSizes},
    {"groups", CheckGroups},       {"rows", CheckRows},    {"alignment", CheckAlignment},
    {"full_device", CheckFullDevice}, {"edges", CheckEdges},
};

}  // namespace

int main(int count, char** arguments) {
  const auto initial = hra::device::emulated;
  int sections = 0;
  for (const auto& [name, check] : kSections) {
    if (count > 1 && std::strcmp(arguments[1], name) != 0) continue;
    hra::device::emulated = initial;
    check();
    ++sections;
  }
  std::printf("%d sections, %d launches, %d failures\n", sections, hra::device::launches, failures);
  return failures == 0 && sections > 0 ? 0 : 1;
}
