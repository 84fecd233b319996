// Blocks of keys and values out of a paged pool, as the register kernels of cpu.cc read them.

#ifndef KVJAX_PAGED_ATTENTION_CPU_PAGES_H_
#define KVJAX_PAGED_ATTENTION_CPU_PAGES_H_

#include <limits>
#include <type_traits>
#include <utility>

#include "words.h"

namespace kvjax {

constexpr int kBlock = 64;  // keys in a block: one bit each in a Mask

using Mask = uint64_t;
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint8_t Float8Vec __attribute__((vector_size(kLanes)));

// Pages of single bytes carry a scale per slot and head.
template <typename T>
constexpr bool kScaled = sizeof(T) == 1;

// What pages are multiplied as. Pairs of bfloat16 where the processor multiplies them; elsewhere
// float32, to which a block is unpacked once for all rows of a tile.
#ifdef __AVX512BF16__
template <typename T>
using KindOf = std::conditional_t<std::is_same_v<T, uint16_t>, BFloat16, Float32>;
#else
template <typename T>
using KindOf = Float32;
#endif

// A vector of the numbers of a page, which holds float32, the bits of bfloat16 (uint16), int8 or the bits of
// float8_e4m3fn (uint8), the last two without their scale.
inline Vec PageNumbers(const float* p) { return Load(p); }

inline Vec PageNumbers(const uint16_t* p) {
  return (Vec)(__builtin_convertvector(Load<HalfVec>(p), IntVec) << 16);
}

inline Vec PageNumbers(const int8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(Load<ByteVec>(p), IntVec), Vec);
}

inline Vec PageNumbers(const uint8_t* p) {
  const IntVec bits = __builtin_convertvector(Load<Float8Vec>(p), IntVec), size = bits & 0x7f;
  // Seven bits of exponent and mantissa; subnormals are counted, as XLA's threads flush them.
  const Vec normal = (Vec)((size << 20) + (120 << 23));
  const Vec subnormal = __builtin_convertvector(size, Vec) * 0x1p-9f;
  Vec x = size < 8 ? subnormal : normal;
  x = size == 0x7f ? Splat(std::numeric_limits<float>::quiet_NaN()) : x;
  return (Vec)((IntVec)x | ((bits & 0x80) << 24));
}

// Swaps the off-diagonal halves of every 2*S x 2*S square; all S from half the lanes to 1 transpose.
template <int S, int... I>
inline void Exchange(IntVec (&a)[kLanes], std::integer_sequence<int, I...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const IntVec x = a[i], y = a[i + S];
    a[i] = __builtin_shufflevector(x, y, (I & S ? kLanes + I - S : I)...);
    a[i + S] = __builtin_shufflevector(x, y, (I & S ? kLanes + I : I + S)...);
  }
}

inline void Transpose(IntVec (&a)[kLanes]) {
  if constexpr (kLanes > 8) Exchange<8>(a, AllLanes());
  if constexpr (kLanes > 4) Exchange<4>(a, AllLanes());
  Exchange<2>(a, AllLanes());
  Exchange<1>(a, AllLanes());
}

// Where the keys and values of a block begin: null where no row of the tile looks.
template <typename T>
struct Slots {
  const T *k[kBlock], *v[kBlock];
  float k_scale[kBlock], v_scale[kBlock];
};

// `count` numbers, a vector at most, at `p`, with zeros behind them.
template <typename V, typename T>
inline V Padded(const T* p, int count) {
  if (count >= static_cast<int>(sizeof(V) / sizeof(T))) return Load<V>(p);
  V v = {};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}

// A vector of words, of channels or pairs of them, from `first` on of one key.
template <typename T>
inline IntVec KeyWords(const T* row, int first, int width, float scale) {
  if (row == nullptr) return IntVec{};
  if constexpr (KindOf<T>::kPerWord == 2) {
    return Padded<IntVec>(row + first, width - first);
  } else {
    T padded[kLanes] = {};
    const T* from = row + first;
    if (width - first < kLanes) {
      std::memcpy(padded, from, (width - first) * sizeof(T));
      from = padded;
    }
    const Vec x = PageNumbers(from);
    if constexpr (kScaled<T>) return (IntVec)(x * scale);
    return (IntVec)x;
  }
}

// Keys as words [channels, kBlock], channels in whole vectors of words; zeros where nobody looks.
template <typename T>
void UnpackKeys(const Slots<T>& slots, int width, Word* keys) {
  constexpr int kStep = kLanes * KindOf<T>::kPerWord;
  for (int d = 0; d < width; d += kStep, keys += kLanes * kBlock) {
    for (int j = 0; j < kBlock; j += kLanes) {
      IntVec square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = KeyWords(slots.k[j + i], d, width, slots.k_scale[j + i]);
      Transpose(square);
      for (int i = 0; i < kLanes; ++i) Store(keys + i * kBlock + j, square[i]);
    }
  }
}

// Values as words [kBlock, channels], where a word takes a channel of one key or of two; zeros
// where nobody looks. `padded` are the channels in whole vectors.
template <typename T>
void UnpackValues(const Slots<T>& slots, int width, int padded, Word* values) {
  constexpr int kKeys = KindOf<T>::kPerWord;
  for (int b = 0; b < kBlock; b += kKeys, values += padded) {
    for (int c = 0; c < width; c += kLanes) {
      if constexpr (kKeys == 2) {
        const auto half = [=](const T* row) {
          const HalfVec x = row ? Padded<HalfVec>(row + c, width - c) : HalfVec{};
          return __builtin_convertvector(x, IntVec);
        };
        Store(values + c, half(slots.v[b]) | half(slots.v[b + 1]) << 16);
      } else {
        Store(values + c, KeyWords(slots.v[b], c, width, slots.v_scale[b]));
      }
    }
  }
}

}  // namespace kvjax

#endif  // KVJAX_PAGED_ATTENTION_CPU_PAGES_H_
