// Threads of a cluster as fibers: who runs, who waits at which barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fibers {

constexpr int kLanes = 32;

struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;
};

// One fiber's arrival at a barrier; the wait ends when the barrier's generation has moved on.
struct Arrival {
  const Barrier* barrier = nullptr;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) char places[2][kLanes * 32];  // what lanes give one another
};

struct Block {
  unsigned x, y;
  int rank;  // within the cluster
  int running;   // how many of its threads have not ended
  bool started;  // whether one of them has begun
  char* shared;
  Barrier barrier;
};

struct Fiber {
  int thread;
  Block* block;
  Warp* warp;
  Barrier* cluster_barrier;
  Arrival arrived;    // at the cluster's barrier, between its halves
  Arrival waits;      // what it waits for now
  unsigned exchanges = 0;
  void* stack = nullptr;  // where it goes on
  bool done = false;
};

struct Cluster {
  unsigned x, y, blocks, threads, shared_bytes;
  bool descending;
};

Fiber& Current();
Arrival Arrive(Barrier& barrier);
void Wait(const Arrival& arrival);

// Ends the program with the text when `holds` is false.
void Require(bool holds, const char* text);

// Runs `body` as every thread of one cluster. A deadlock ends the program.
void RunCluster(const Cluster& cluster, const std::function<void()>& body);

}  // namespace fibers
