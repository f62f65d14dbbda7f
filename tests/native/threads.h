// Threads for a task, as a runtime has them: they wait for work without sleeping.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#include "task.h"

namespace check {

// The calling thread, one unit after the other.
inline hra::Parallel OneAfterTheOther(int threads) {
  return {[](const hra::Parallel&, void (*work)(void*, size_t), size_t n, void* data) {
            for (size_t i = 0; i < n; ++i) work(data, i);
          },
          nullptr, threads};
}

// `threads` of them, the calling one included.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { Serve(); });
  }
  ~Pool() {
    is_over_.store(true, std::memory_order_release);
    for (auto& worker : workers_) worker.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  hra::Parallel Parallel() { return {Run, this, static_cast<int>(workers_.size()) + 1}; }

 private:
  static void Run(const hra::Parallel& self, void (*work)(void*, size_t), size_t n, void* data) {
    auto* pool = static_cast<Pool*>(self.pool);
    pool->work_ = work, pool->data_ = data, pool->size_ = n;
    pool->idle_.store(0, std::memory_order_relaxed);
    pool->next_.store(0, std::memory_order_relaxed);
    pool->turn_.fetch_add(1, std::memory_order_release);
    pool->Take();
    while (pool->idle_.load(std::memory_order_acquire) < pool->workers_.size()) std::this_thread::yield();
  }

  void Take() {
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < size_;) work_(data_, i);
  }

  void Serve() {
    for (size_t seen = 0;;) {
      const size_t turn = turn_.load(std::memory_order_acquire);
      if (turn != seen) {
        seen = turn;
        Take();
        idle_.fetch_add(1, std::memory_order_release);
        turns_ = 0;
      } else if (is_over_.load(std::memory_order_acquire)) {
        return;
      } else if (++turns_ % 256 == 0) {
        std::this_thread::yield();
      }
    }
  }

  std::vector<std::thread> workers_;
  void (*work_)(void*, size_t) = nullptr;
  void* data_ = nullptr;
  size_t size_ = 0;
  static thread_local inline unsigned turns_ = 0;
  alignas(64) std::atomic<size_t> next_{0};
  alignas(64) std::atomic<size_t> turn_{0};
  alignas(64) std::atomic<size_t> idle_{0};
  std::atomic<bool> is_over_{false};
};

}  // namespace check
