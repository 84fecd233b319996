// Products of few or many rows with packed weights on a CPU: XLA FFI handlers.
//
// Weights lie in panels of 32 output channels, so that a register kernel reads them as one stream:
// word d of a channel is one float32, two bfloat16 or four int8 along the input, and a panel is
// [words, 32]. Every output is one chain of multiply-adds over the input, whatever rows stand
// beside it: a row's bits depend on nothing but the row.

#include <algorithm>
#include <vector>

#include "words.h"

namespace {

using namespace kvjax;

constexpr int kWidth = 32;                 // output channels of a panel
constexpr int kVectors = kWidth / kLanes;  // vectors across a panel
// Rows of a register kernel: 24 sums of 32 registers with AVX-512 or on ARM, 12 of 16 with AVX.
constexpr int kRows = kLanes == 16 ? 12 : 3;
constexpr int kBlocks = 72 / kRows;      // blocks of rows that meet a panel while it is in cache
constexpr int kTasks = 16;               // at least, where the weights have as many panels
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

// The kinds of weights: how a vector of words of a row of x is made, and one step of a chain. `scale`
// is what the row was divided by: one, unless the words are integers.
template <typename Kind>
struct Floats : Kind {
  static float Scale(const float*, int64_t) { return 1; }

  static IntVec Words(const float* x, float) { return Kind::Words(x); }
};

struct Int8 {
  static constexpr int kPerWord = 4;
  using Sum = IntVec;

  // The largest size is 127 steps. NaN makes NaN.
  static float Scale(const float* x, int64_t width) {
    Vec tops = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec v = Numbers(x + i, width - i), size = v < 0 ? -v : v;
      tops = (size > tops) | (size != size) ? size : tops;
    }
    float top = 1e-8f;
    for (int i = 0; i < kLanes; ++i) top = tops[i] > top || tops[i] != tops[i] ? tops[i] : top;
    return top / 127;
  }

  // Steps, rounded, with 128 added: unsigned bytes.
  static IntVec Words(const float* x, float scale) {
    uint8_t bytes[4 * kLanes];
    for (int i = 0; i < 4 * kLanes; i += kLanes) {
      const Vec steps = Load(x + i) / scale + kRounder - kRounder;
      const IntVec near = __builtin_convertvector(steps, IntVec);
      Store(bytes + i, __builtin_convertvector(near + 128, ByteVec));
    }
    return Load<IntVec>(bytes);
  }

  static Sum Step(Sum sum, Word x, const void* w) {
#ifdef __AVX512VNNI__
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), Load<__m512i>(w));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // As pairs of 16 bits: the products of bytes would not fit where they are added.
    const __m256i bytes = Load<__m256i>(w);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    const __m256i odd = _mm256_srai_epi16(bytes, 8);
    return sum + (IntVec)_mm256_madd_epi16(even, _mm256_set1_epi32(x & 0x00ff00ff)) +
           (IntVec)_mm256_madd_epi16(odd, _mm256_set1_epi32(x >> 8 & 0x00ff00ff));
#else
    const IntVec bytes = Load<IntVec>(w);
    for (int i = 0; i < 4; ++i)
      sum += (bytes << (24 - 8 * i) >> 24) * static_cast<int32_t>(x >> (8 * i) & 0xff);
    return sum;
#endif
  }
};

struct Shape {
  int64_t rows, in, out, words;
};

// What the 128 in every byte of x adds to the sums of a panel.
inline void Excess(const char* panel, int64_t words, IntVec* sums) {
  for (int v = 0; v < kVectors; ++v) sums[v] = IntVec{};
  for (int64_t i = 0; i < words * kVectors; ++i)
    sums[i % kVectors] = Int8::Step(sums[i % kVectors], 0x80808080, panel + i * sizeof(Vec));
}

// R interleaved rows of words times one panel.
template <typename Kind, int R>
void Block(const Word* x, const char* panel, int64_t words, typename Kind::Sum* sums) {
  typename Kind::Sum sum[R][kVectors] = {};
  for (int64_t d = 0; d < words; ++d) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = Kind::Step(sum[r][v], x[d * R + r], panel + (d * kVectors + v) * sizeof(Vec));
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r * kVectors + v] = sum[r][v];
}

template <typename Kind, int R = kRows>
void AnyBlock(int rows, const Word* x, const char* panel, int64_t words, typename Kind::Sum* sums) {
  if constexpr (R > 1) {
    if (rows < R) return AnyBlock<Kind, R - 1>(rows, x, panel, words, sums);
  }
  Block<Kind, R>(x, panel, words, sums);
}

// Rows of x as words, those of a block interleaved: what the register kernel reads is one stream.
template <typename Kind>
void Prepare(const float* x, int rows, Shape s, Word* words, float* scales) {
  constexpr int kNumbers = kLanes * Kind::kPerWord;
  for (int r = 0; r < rows; ++r) {
    const float* row = x + r * s.in;
    scales[r] = Kind::Scale(row, s.in);
    for (int64_t d = 0; d < s.words; d += kLanes) {
      const int64_t left = s.in - d * Kind::kPerWord;
      float padded[kNumbers] = {};
      if (left < kNumbers) std::memcpy(padded, row + d * Kind::kPerWord, left * sizeof(float));
      const IntVec made =
          Kind::Words(left < kNumbers ? padded : row + d * Kind::kPerWord, scales[r]);
      const int count = static_cast<int>(std::min<int64_t>(kLanes, s.words - d));
      for (int i = 0; i < count; ++i) words[(d + i) * rows + r] = made[i];
    }
  }
}

// What a panel's sums of one block of rows are, less the excess.
template <typename Kind>
struct Panel {
  const char* words;
  typename Kind::Sum excess[kVectors] = {}, sums[kRows * kVectors];

  Panel(const void* panels, int64_t p, int64_t depth)
      : words(static_cast<const char*>(panels) + p * depth * kVectors * sizeof(Vec)) {
    if constexpr (Kind::kPerWord == 4) Excess(words, depth, excess);
  }

  void Multiply(int rows, const Word* x, int64_t depth) {
    AnyBlock<Kind>(rows, x, words, depth, sums);
    for (int i = 0; i < rows * kVectors; ++i) sums[i] -= excess[i % kVectors];
  }
};

// x times all panels, or every panel together with the one `partner` panels on. `finish` turns a
// vector of sums for channels from `first` on, and their partners', to float32.
template <typename Kind, typename Finish>
void Multiply(ffi::ThreadPool& pool, const float* x, const void* panels, float* out, Shape s,
              Finish finish, int64_t partner = 0) {
  thread_local std::vector<Word> all_words;
  thread_local std::vector<float> all_scales;
  all_words.resize(s.rows * s.words);
  all_scales.resize(s.rows);
  Word* words = all_words.data();  // of this thread, and read by the others until all are done
  float* scales = all_scales.data();

  const int64_t blocks = RoundUp(s.rows, kRows) / kRows;
  const int64_t block = RoundUp(s.rows, blocks) / blocks;  // rows of each, but for the last
  Parallel(pool, blocks, [=](int64_t b) {
    const int64_t from = b * block, rows = std::min(block, s.rows - from);
    Prepare<Kind>(x + from * s.in, rows, s, words + from * s.words, scales + from);
  });

  const int64_t num_panels = RoundUp(s.out, kWidth) / kWidth;
  const int64_t chunks = RoundUp(blocks, kBlocks) / kBlocks;
  const int64_t groups = std::min(num_panels, RoundUp(kTasks, chunks) / chunks);
  Parallel(pool, chunks * groups, [=](int64_t task) {
    const int64_t g = task % groups, first = task / groups * kBlocks;
    for (int64_t p = num_panels * g / groups; p < num_panels * (g + 1) / groups; ++p) {
      Panel<Kind> own(panels, p, s.words), other(panels, p + partner, s.words);
      for (int64_t b = first; b < std::min(first + kBlocks, blocks); ++b) {
        const int64_t from = b * block;
        const int rows = static_cast<int>(std::min(block, s.rows - from));
        own.Multiply(rows, words + from * s.words, s.words);
        if (partner) other.Multiply(rows, words + from * s.words, s.words);
        for (int i = 0; i < rows * kVectors; ++i) {
          const int64_t row = from + i / kVectors, at = p * kWidth + i % kVectors * kLanes;
          const int64_t count = std::min<int64_t>(kLanes, s.out - at);
          if (count <= 0) continue;  // padding of the last panel
          const Vec y = finish(own.sums[i], other.sums[i], at, scales[row]);
          std::memcpy(out + row * s.out + at, &y, count * sizeof(float));
        }
      }
    }
  });
}

template <typename Kind>
Shape ShapeOf(const ffi::Buffer<ffi::F32>& x, ffi::ResultBuffer<ffi::F32>& out) {
  const int64_t in = x.dimensions()[1];
  return {x.dimensions()[0], in, out->dimensions()[1], RoundUp(in, Kind::kPerWord) / Kind::kPerWord};
}

// Rows up to the last that is not all zeros: a step's padding stands behind its tokens.
inline int64_t RowsInUse(const float* x, Shape s) {
  int64_t rows = s.rows;
  while (rows && std::all_of(x + (rows - 1) * s.in, x + rows * s.in, [](float v) { return v == 0; }))
    --rows;
  return rows;
}

template <typename Kind, typename Finish>
void Multiply(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x, const ffi::AnyBuffer& panels,
              ffi::ResultBuffer<ffi::F32>& out, Finish finish, int64_t partner = 0) {
  Shape s = ShapeOf<Kind>(x, out);
  const int64_t rows = RowsInUse(x.typed_data(), s);
  float* y = out->typed_data();
  std::fill(y + rows * s.out, y + s.rows * s.out, 0.0f);
  s.rows = rows;
  if (rows) Multiply<Kind>(pool, x.typed_data(), panels.untyped_data(), y, s, finish, partner);
}

// Calls `multiply(kind)` for the kind of float weights that `panels` holds.
template <typename F>
ffi::Error WithKind(const ffi::AnyBuffer& panels, F multiply) {
  if (panels.element_type() == ffi::F32)
    multiply(Floats<Float32>{});
  else if (panels.element_type() == ffi::BF16)
    multiply(Floats<BFloat16>{});
  else
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "weights must be float32 or bfloat16");
  return ffi::Error::Success();
}

inline Vec Sigmoid(Vec x) {
  const Vec e = Exp(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : Splat(1)) / (1.0f + e);
}

inline Vec Silu(Vec x) { return x * Sigmoid(x); }

// The approximation by tanh: (1 + tanh(z)) / 2 is the sigmoid of 2 z.
inline Vec Gelu(Vec x) { return x * Sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

inline Vec Gated(Vec gate, Vec up, bool gelu) { return (gelu ? Gelu(gate) : Silu(gate)) * up; }

ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer panels,
                  ffi::ResultBuffer<ffi::F32> out) {
  return WithKind(panels, [&](auto kind) {
    Multiply<decltype(kind)>(pool, x, panels, out, [](Vec y, Vec, int64_t, float) { return y; });
  });
}

ffi::Error GatedLinear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer panels,
                       ffi::ResultBuffer<ffi::F32> out, bool gelu) {
  return WithKind(panels, [&](auto kind) {
    Multiply<decltype(kind)>(
        pool, x, panels, out,
        [=](Vec gate, Vec up, int64_t, float) { return Gated(gate, up, gelu); },
        panels.dimensions()[0] / 2);
  });
}

ffi::Error Int8Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer panels,
                      ffi::Buffer<ffi::F32> scales, ffi::ResultBuffer<ffi::F32> out) {
  const float* w = scales.typed_data();
  const int64_t count = scales.element_count();
  Multiply<Int8>(pool, x, panels, out, [=](IntVec sum, IntVec, int64_t at, float scale) {
    return __builtin_convertvector(sum, Vec) * scale * Numbers(w + at, count - at);
  });
  return ffi::Error::Success();
}

ffi::Error Int8GatedLinear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer panels,
                           ffi::Buffer<ffi::F32> scales, ffi::ResultBuffer<ffi::F32> out,
                           bool gelu) {
  const float* w = scales.typed_data();
  const int64_t half = scales.element_count() / 2;
  Multiply<Int8>(
      pool, x, panels, out,
      [=](IntVec gate, IntVec up, int64_t at, float scale) {
        return Gated(__builtin_convertvector(gate, Vec) * scale * Load(w + at),
                     __builtin_convertvector(up, Vec) * scale * Load(w + half + at), gelu);
      },
      panels.dimensions()[0] / 2);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvjax_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvjax_gated_linear, GatedLinear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("gelu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvjax_int8_linear, Int8Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvjax_int8_gated_linear, Int8GatedLinear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("gelu"));
