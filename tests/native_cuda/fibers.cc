// Fibers by swapping stacks. x86-64 has a switch of its own; elsewhere the C library's is used, which is slower.
#include "fibers.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fibers {
namespace {

// Sanitized frames are large; pages that are not touched cost nothing.
constexpr size_t kStackBytes = 256 * 1024;

Fiber* current = nullptr;
const std::function<void()>* job = nullptr;
void* scheduler = nullptr;

void Start();

#if defined(__x86_64__)

extern "C" void fibers_switch(void** from, void* to);
// Keeps what the System V ABI wants kept on the old stack, and goes on where the new one was left.
asm(R"(
.text
fibers_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void Switch(void** from, void* to) { fibers_switch(from, to); }

void* Prepare(char* stack, size_t size) {
  // As if Start had been about to be returned to: six registers, its address, and the alignment of a function's entry.
  auto** top = reinterpret_cast<void**>(stack + size) - 1;
  *--top = reinterpret_cast<void*>(&Start);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

#else

void Switch(void** from, void* to) {
  static thread_local ucontext_t outside;
  if (*from == nullptr) *from = &outside;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

void* Prepare(char* stack, size_t size) {
  auto* context = reinterpret_cast<ucontext_t*>(stack);  // the low end, which the stack does not reach
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t) / 64 * 64 + 64;
  context->uc_stack.ss_size = size - (sizeof(ucontext_t) / 64 * 64 + 64);
  context->uc_link = nullptr;
  makecontext(context, &Start, 0);
  return context;
}

#endif

// Stacks are kept from one cluster to the next.
char* Stack(size_t i) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= i) stacks.emplace_back(new char[kStackBytes]);
  return stacks[i].get();
}

void FillWithNan(char* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }

void Start() {
  (*job)();
  Require(!current->arrived.barrier, "ends between the halves of the cluster's barrier");
  current->done = true;
  Switch(&current->stack, scheduler);
}

bool CanRun(const Fiber& fiber) {
  return !fiber.done && !(fiber.waits.barrier && fiber.waits.barrier->generation == fiber.waits.generation);
}

void Run(Fiber& fiber, unsigned shared_bytes) {
  current = &fiber;
  fiber.block->started = true;
  Switch(&scheduler, fiber.stack);
  current = nullptr;
  if (fiber.done && --fiber.block->running == 0) FillWithNan(fiber.block->shared, shared_bytes);
}

// Lets each fiber of one block run to its next barrier; false when none could.
bool StepBlock(Fiber* fibers, const Cluster& cluster) {
  bool ran = false;
  for (unsigned i = 0; i < cluster.threads; ++i) {
    Fiber& fiber = fibers[cluster.descending ? cluster.threads - 1 - i : i];
    if (!CanRun(fiber)) continue;
    Run(fiber, cluster.shared_bytes);
    ran = true;
  }
  return ran;
}

// One step of the first block, then as many of each other as it can make before it must wait for another.
bool RunBlocks(std::vector<Fiber>& all, const Cluster& cluster) {
  bool ran = false;
  for (unsigned i = 0; i < cluster.blocks; ++i) {
    const unsigned block = cluster.descending ? cluster.blocks - 1 - i : i;
    while (StepBlock(&all[block * cluster.threads], cluster)) {
      ran = true;
      if (i == 0) break;
    }
  }
  return ran;
}

}  // namespace

Fiber& Current() { return *current; }

Arrival Arrive(Barrier& barrier) {
  const Arrival arrival = {&barrier, barrier.generation};
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return arrival;
}

void Wait(const Arrival& arrival) {
  Fiber& self = *current;
  self.waits = arrival;
  // The last to arrive waits for its turn as well: it must not run ahead of the order.
  Switch(&self.stack, scheduler);
  self.waits = {};
}

void Require(bool holds, const char* text) {
  if (holds) return;
  std::fprintf(stderr, "emulated device: thread %d of block %u: %s\n", current ? current->thread : -1,
               current ? current->block->x : 0, text);
  std::exit(3);
}

void RunCluster(const Cluster& cluster, const std::function<void()>& body) {
  const size_t threads = cluster.threads;
  std::vector<Block> blocks(cluster.blocks);
  std::vector<std::unique_ptr<char[]>> shared(cluster.blocks);
  std::vector<Warp> warps(cluster.blocks * threads / kLanes);
  Barrier together{static_cast<int>(cluster.blocks * threads)};
  for (Warp& warp : warps) warp.barrier.expected = kLanes;
  std::vector<Fiber> all(cluster.blocks * threads);
  for (unsigned b = 0; b < cluster.blocks; ++b) {
    shared[b].reset(new char[cluster.shared_bytes]);
    FillWithNan(shared[b].get(), cluster.shared_bytes);
    blocks[b] = {cluster.x + b, cluster.y, static_cast<int>(b), static_cast<int>(threads), false, shared[b].get(), {}};
    blocks[b].barrier.expected = static_cast<int>(threads);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    Fiber& fiber = all[i];
    fiber.thread = static_cast<int>(i % threads);
    fiber.block = &blocks[i / threads];
    fiber.warp = &warps[i / kLanes];
    fiber.cluster_barrier = &together;
    fiber.stack = Prepare(Stack(i), kStackBytes);
  }
  job = &body;
  while (RunBlocks(all, cluster)) {
  }
  for (Fiber& fiber : all) {
    current = &fiber;
    Require(fiber.done, "waits for ever at a barrier");
  }
  current = nullptr;
}

}  // namespace fibers
