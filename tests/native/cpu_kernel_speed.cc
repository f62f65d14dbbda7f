// How fast the reflection on the CPU is, against what the machine can do.
//
//   cpu_kernel_speed [THREADS] [MILLISECONDS]     of every line; 2 and 300 by default
//
// `read` is what the machine can do: a search through a large array, with all threads.
// A line is one call of a group. Its bytes are those of X, U, V and Y, once; with one row U and V come from memory, as
// when a token is made (each call takes other ones, of more than any cache holds); with many rows they stay.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu_instructions.h"
#include "cpu_reflection.h"
#include "threads.h"

namespace {

using hra::Type;
using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Median of the seconds of a call.
template <class Call>
double Median(Call call, double budget) {
  std::vector<double> seconds;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    call();
    seconds.push_back(Seconds(start));
  } while (Seconds(begin) < budget || seconds.size() < 5);
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<long>(seconds.size() / 2), seconds.end());
  return seconds[seconds.size() / 2];
}

// Looks through a share of some zeros for what is not there: the C library reads as fast as the machine can.
struct Reader {
  const char* zeros;
  size_t share;

  static void Work(void* self, size_t i) {
    const auto* reader = static_cast<Reader*>(self);
    if (std::memchr(reader->zeros + i * reader->share, 1, reader->share) != nullptr) std::abort();
  }
};

// Each call reads other memory; a call is short, so that few are interrupted.
double ReadBandwidth(const hra::Parallel& pool, const std::vector<float>& data, double budget) {
  constexpr size_t kCall = size_t{2} << 20;
  const auto threads = static_cast<size_t>(pool.threads);
  size_t at = 0;
  const double seconds = Median(
      [&] {
        if (at + kCall > data.size() * sizeof(float)) at = 0;
        Reader reader{reinterpret_cast<const char*>(data.data()) + at, kCall / threads};
        pool.run(pool, Reader::Work, threads, &reader);
        at += kCall;
      },
      budget);
  return kCall / seconds;
}

struct Line {
  const char* name;
  int64_t rows, features, rank, members;
};

// Sizes of SmolLM2-135M, MiniLM and an 8B model.
constexpr Line kLines[] = {
    {"decode q/k/v   576", 1, 576, 8, 3},      {"decode q/k/v   576", 1, 576, 32, 3},
    {"decode down   1536", 1, 1536, 8, 1},     {"decode down   1536", 1, 1536, 32, 1},
    {"decode q/k/v  4096", 1, 4096, 8, 3},     {"decode q/k/v  4096", 1, 4096, 32, 3},
    {"decode down  14336", 1, 14336, 8, 1},    {"8 rows q/k/v  576", 8, 576, 8, 3},
    {"prefill q/k/v  576", 128, 576, 8, 3},    {"prefill o      576", 128, 576, 8, 1},
    {"prefill down  1536", 128, 1536, 8, 1},   {"prefill q/k/v  576", 128, 576, 32, 3},
    {"prefill q/k/v  384", 128, 384, 8, 3},    {"prefill q/k/v 4096", 128, 4096, 8, 3},
    {"prefill q/k/v 4096", 128, 4096, 32, 3},
};

void Measure(const Line& line, Type type, const hra::Parallel& pool, std::vector<float>* factors, double read,
             double budget) {
  const size_t element = type == Type::kFloat32 ? 4 : 2;
  const auto outputs = static_cast<size_t>(line.members * line.rows * line.features);
  std::vector<float> x(static_cast<size_t>(line.rows * line.features)), y(outputs);
  const auto factor = static_cast<size_t>(line.features * line.rank) * element;
  const size_t per_call = factor * 2 * static_cast<size_t>(line.members), all = factors->size() * sizeof(float);
  char* memory = reinterpret_cast<char*>(factors->data());
  size_t at = 0;
  const double seconds = Median(
      [&] {
        if (line.rows > 8 || at + per_call > all) at = 0;
        std::vector<hra::Member> members;
        for (int64_t i = 0; i < line.members; ++i, at += 2 * factor) {
          char* to = reinterpret_cast<char*>(y.data()) + static_cast<size_t>(i * line.rows * line.features) * element;
          members.push_back({memory + at, memory + at + factor, to, line.rank, 1});
        }
        const hra::Task task{type,    x.data(),  line.rows,      line.features,
                             nullptr, line.rows, members.data(), line.members};
        hra::ReflectOnCpu(task, pool);
      },
      budget);
  const double flops = 4.0 * static_cast<double>(line.members * line.rows * line.features * line.rank);
  const double bytes = static_cast<double>(per_call) + static_cast<double>((x.size() + y.size()) * element);
  std::printf("%s  n %4ld  r %3ld  x%ld  %s  %8.1f us  %6.1f GB/s (%3.0f %% of read)  %7.1f GFLOP/s\n", line.name,
              static_cast<long>(line.rows), static_cast<long>(line.rank), static_cast<long>(line.members),
              type == Type::kFloat32 ? "float32" : "float16", seconds * 1e6, bytes / seconds * 1e-9,
              100 * bytes / seconds / read, flops / seconds * 1e-9);
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 2;
  const double budget = (count > 2 ? std::atof(arguments[2]) : 300) * 1e-3;
  check::Pool pool(threads);
  std::vector<float> factors(size_t{64} << 20, 0.0f);
  const double read = ReadBandwidth(pool.Parallel(), factors, budget);
  std::printf("%s, %d threads; read %.1f GB/s\n", hra::cpu::BestInstructions().name, threads, read * 1e-9);
  for (const Type type : {Type::kFloat32, Type::kFloat16})
    for (const Line& line : kLines) Measure(line, type, pool.Parallel(), &factors, read, budget);
  return 0;
}
