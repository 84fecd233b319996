// Numbers as 32-bit words along what is summed over, and one step of a chain of multiply-adds: what
// the products of layers and of attention have in common.

#ifndef KVJAX_WORDS_H_
#define KVJAX_WORDS_H_

#include "native.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace kvjax {

using Word = uint32_t;
typedef uint32_t UIntVec __attribute__((vector_size(4 * kLanes)));

// A word is one float32.
struct Float32 {
  static constexpr int kPerWord = 1;
  using Sum = Vec;

  static IntVec Words(const float* x) { return Load<IntVec>(x); }

  static Sum Step(Sum sum, Word x, const void* w) {
    float f;
    std::memcpy(&f, &x, sizeof f);
    return sum + f * Load(w);
  }
};

// A word is two bfloat16, the first one low.
struct BFloat16 {
  static constexpr int kPerWord = 2;
  using Sum = Vec;

  static IntVec Words(const float* x) {
#ifdef __AVX512BF16__
    return (IntVec)_mm512_cvtne2ps_pbh(Load<__m512>(x + kLanes), Load<__m512>(x));
#else
    const IntVec a = Rounded(Load(x)), b = Rounded(Load(x + kLanes));
    return Pairs(a, b, AllLanes());
#endif
  }

  template <int... I>
  static IntVec Pairs(IntVec a, IntVec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, 2 * I...) | __builtin_shufflevector(a, b, 2 * I + 1 ...)
                                                         << 16;
  }

  static IntVec Rounded(Vec x) {  // to nearest, ties to even
    const UIntVec bits = (UIntVec)x;
    const IntVec near = (IntVec)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return x != x ? IntVec{} + 0x7fc0 : near;
  }

  static Sum Step(Sum sum, Word x, const void* w) {
#ifdef __AVX512BF16__
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x),
                                 (__m512bh)Load<__m512i>(w));
#else
    const IntVec pairs = Load<IntVec>(w);
    const IntVec low = pairs << 16, high = pairs & static_cast<int32_t>(0xffff0000);
    float x0, x1;
    const Word low_x = x << 16, high_x = x & 0xffff0000;
    std::memcpy(&x0, &low_x, sizeof x0);
    std::memcpy(&x1, &high_x, sizeof x1);
    return sum + x0 * (Vec)low + x1 * (Vec)high;
#endif
  }
};

}  // namespace kvjax

#endif  // KVJAX_WORDS_H_
