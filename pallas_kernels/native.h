// What the C++ kernels share: vectors, and the threads of XLA's pool.

#ifndef KVJAX_NATIVE_H_
#define KVJAX_NATIVE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace kvjax {

namespace ffi = xla::ffi;

// 32-bit numbers in a vector: what a register holds. Vectors that are wider compile to code that is
// ten times slower.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using AllLanes = std::make_integer_sequence<int, kLanes>;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

template <typename V = Vec>
inline V Load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
inline void Store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline Vec Splat(float x) { return Vec{} + x; }

// The first `count` numbers at `p`, a vector at most, with zeros behind them.
inline Vec Numbers(const float* p, int64_t count) {
  if (count >= kLanes) return Load(p);
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline int64_t RoundUp(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// exp(x) for x <= 0: NaN for NaN, zero below 2^-126. The Taylor series of 2^r, |r| <= 1/2.
inline Vec Exp(Vec x) {
  x *= 1.44269504088896341f;
  const IntVec tiny = x < -126.0f;
  x = tiny ? Splat(-126.0f) : x;
  const IntVec n = __builtin_convertvector(x - 0.5f, IntVec);  // rounds, since x <= 0
  const Vec r = x - __builtin_convertvector(n, Vec);
  Vec y = Splat(1.52527338e-5f);
  y = y * r + 1.54035304e-4f;
  y = y * r + 1.33335581e-3f;
  y = y * r + 9.61812911e-3f;
  y = y * r + 5.55041087e-2f;
  y = y * r + 2.40226507e-1f;
  y = y * r + 6.93147181e-1f;
  y = y * r + 1.0f;
  y *= (Vec)((n + 127) << 23);
  return tiny ? Vec{} : y;
}

inline float Exp(float x) { return Exp(Splat(x))[0]; }

inline Vec Tanh(Vec x) {
  const Vec e = Exp(x < 0.0f ? 2.0f * x : -2.0f * x);
  const Vec y = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}

// Calls `task(i)` for every i below `count`, on this thread and on XLA's, which take them one by
// one. A pool thread that comes late finds none left and touches nothing but the counter; nobody
// waits for it.
template <typename Task>
void Parallel(ffi::ThreadPool& pool, int64_t count, Task task) {
  if (count == 1) return task(0);
  struct Work {
    Task task;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};

    Work(Task t, int64_t n) : task(std::move(t)), count(n) {}

    void Run() {
      for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1)) task(i);
    }
  };
  auto work = std::make_shared<Work>(std::move(task), count);
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count);
  for (int64_t i = 1; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load() < count) std::this_thread::yield();
}

}  // namespace kvjax

#endif  // KVJAX_NATIVE_H_
