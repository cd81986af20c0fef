#include "rosakit/pool.hpp"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace rosakit {
namespace {

unsigned positive_env(const char* name) {
  const char* text = std::getenv(name);
  if (!text || !*text) return 0;
  char* rest = nullptr;
  const long value = std::strtol(text, &rest, 10);
  return *rest == 0 && value >= 1 && value <= 1024 ? static_cast<unsigned>(value) : 0;
}

unsigned default_threads() {
  if (const unsigned n = positive_env("ROSAKIT_NUM_THREADS")) return n;
  unsigned cores = std::thread::hardware_concurrency();
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = static_cast<unsigned>(CPU_COUNT(&set));
#endif
  const unsigned ranks = positive_env("LOCAL_WORLD_SIZE");
  const unsigned share = cores / (ranks ? ranks : 1);
  return share ? share : 1;
}

using Task = std::function<void(std::size_t, unsigned)>;

/// Helper threads that wait on a condition variable between jobs.
class Pool {
 public:
  explicit Pool(unsigned helpers) {
    for (unsigned h = 0; h < helpers; ++h) threads_.emplace_back([this, h] { serve(h + 1); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  unsigned helpers() const { return static_cast<unsigned>(threads_.size()); }

  void run(std::size_t count, const Task& task) {
    {
      std::lock_guard lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      running_ = helpers();
      error_ = nullptr;
      ++job_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void serve(unsigned worker) {
    std::size_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || job_ != seen; });
        if (stopping_) return;
        seen = job_;
      }
      work(worker);
      std::lock_guard lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }
  void work(unsigned worker) {
    try {
      for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
        (*task_)(i, worker);
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const Task* task_ = nullptr;
  std::size_t count_ = 0, job_ = 0;
  std::atomic<std::size_t> next_{0};
  unsigned running_ = 0;
  bool stopping_ = false;
  std::exception_ptr error_;
};

struct Shared {
  std::mutex busy;  // held by the call that uses the pool
  std::unique_ptr<Pool> pool;
  unsigned threads = default_threads();
  pid_t owner = getpid();
};

/// After fork() the child has none of the threads: the parent's pool (and its mutexes, whatever
/// their state) is abandoned, not destroyed, and a new one is made on demand.
std::atomic<Shared*> g_shared{nullptr};
std::mutex g_create;

Shared& shared() {
  Shared* s = g_shared.load(std::memory_order_acquire);
  if (s && s->owner == getpid()) return *s;
  std::lock_guard lock(g_create);
  s = g_shared.load(std::memory_order_acquire);
  if (s && s->owner == getpid()) return *s;
  auto* fresh = new Shared;
  if (s) fresh->threads = s->threads;
  g_shared.store(fresh, std::memory_order_release);
  return *fresh;
}

}  // namespace

unsigned num_threads() {
  return shared().threads;
}

void set_num_threads(unsigned n) {
  if (n < 1 || n > 1024)
    throw std::invalid_argument("num_threads must be between 1 and 1024, got " + std::to_string(n));
  Shared& s = shared();
  std::lock_guard lock(s.busy);
  s.threads = n;
  s.pool.reset();
}

void parallel_for(std::size_t count, const Task& task) {
  Shared& s = shared();
  std::unique_lock lock(s.busy, std::try_to_lock);
  if (!lock.owns_lock() || s.threads == 1 || count <= 1) {
    if (lock.owns_lock()) lock.unlock();
    for (std::size_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  if (!s.pool || s.pool->helpers() + 1 != s.threads) s.pool = std::make_unique<Pool>(s.threads - 1);
  s.pool->run(count, task);
}

}  // namespace rosakit
