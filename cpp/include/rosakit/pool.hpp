// The core's own thread pool: sleeps when idle, survives fork(), never reads OMP_NUM_THREADS.
#pragma once

#include <cstddef>
#include <functional>

namespace rosakit {

inline constexpr unsigned kMaxThreads = 1024;

/// Threads that a call may use, the calling one included.
unsigned num_threads();
/// Throws std::invalid_argument unless 1 <= n <= 1024.
void set_num_threads(unsigned n);

/// Runs task(index, worker) for every index < count, on at most num_threads() threads. `worker` is
/// below kMaxThreads (0 if count is 1) and tells concurrent invocations of one call apart. The
/// first exception is rethrown in the caller. A call that finds the pool busy (another Python
/// thread is in it) runs in its own thread alone.
void parallel_for(std::size_t count, const std::function<void(std::size_t, unsigned)>& task);

}  // namespace rosakit
