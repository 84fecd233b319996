// Register kernels of attention on a CPU: up to six rows against a block of keys or values.

#ifndef KVJAX_PAGED_ATTENTION_CPU_ROWS_H_
#define KVJAX_PAGED_ATTENTION_CPU_ROWS_H_

#include <limits>
#include <type_traits>
#include <utility>

#include "cpu_pages.h"

namespace kvjax {

// Rows, and vectors of keys or channels, in a register kernel: 24 sums of 32 registers with AVX-512,
// 12 of 16 with AVX, 16 of 32 on ARM.
constexpr int kRows = kLanes == 4 ? 4 : 6, kVectors = kLanes == 8 ? 2 : 4;
constexpr int kWide = kVectors * kLanes;
constexpr float kInf = std::numeric_limits<float>::infinity();

// All lanes joined, as a tree.
template <int S = kLanes / 2, typename Join, int... I>
inline float Joined(Vec v, Join join, std::integer_sequence<int, I...> lanes) {
  v = join(v, __builtin_shufflevector(v, v, (I ^ S)...));
  if constexpr (S > 1) return Joined<S / 2>(v, join, lanes);
  return v[0];
}

template <typename Join>
inline float Joined(Vec v, Join join) {
  return Joined(v, join, AllLanes());
}

inline Vec Larger(Vec a, Vec b) { return a > b ? a : b; }

// The lowest bits of a mask, a lane each.
template <int... I>
inline IntVec Lanes(Mask mask, std::integer_sequence<int, I...>) {
  const IntVec bits = {1 << I...};
  return (bits & (IntVec{} + static_cast<int32_t>(mask & ((1 << kLanes) - 1)))) != 0;
}

// Calls `f` with the number `n` below or at N as a compile-time constant.
template <int N, typename F>
static inline void WithConstant(int n, F f) {
  if constexpr (N > 1) {
    if (n < N) return WithConstant<N - 1>(n, f);
  }
  f(std::integral_constant<int, N>{});
}

// scores[r][b] = sum over d of q[r][d] * keys[d][b], for R rows and V vectors of b.
template <typename Kind, int R, int V>
static void Scores(const Word* q, int64_t stride, const Word* keys, int words, float* scores) {
  Vec sum[R][V] = {};
  for (int d = 0; d < words; ++d)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = Kind::Step(sum[r][v], q[r * stride + d], keys + d * kBlock + v * kLanes);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Store(scores + r * kBlock + v * kLanes, sum[r][v]);
}

// out[r][c] = out[r][c] * scale[r] + sum over b of p[r][b] * values[b][c], for R rows and V vectors
// of c.
template <typename Kind, int R, int V>
static void Absorb(const Word* p, const Word* values, int words, int width, const float* scale,
            float* out) {
  Vec sum[R][V] = {};
  for (int b = 0; b < words; ++b)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = Kind::Step(sum[r][v], p[r * kBlock + b], values + b * width + v * kLanes);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* to = out + r * width + v * kLanes;
      Store(to, MultiplyAdd(Load(to), Splat(scale[r]), sum[r][v]));
    }
  }
}

}  // namespace kvjax

#endif  // KVJAX_PAGED_ATTENTION_CPU_ROWS_H_
