// KV of tokens to other slots of the pages it is in, keys turned on the way: an XLA FFI handler.
//
// A token's row of one KV head is read once and written once; the pool is updated in place. Where a
// slot is both read and written, all rows are put aside first.

#include <vector>

#include "words.h"

namespace {

using namespace kvjax;

typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

// `count` numbers of a pool, a vector at most, as float32 with zeros behind them, and back.
inline Vec Read(const float* p, int64_t count) { return Numbers(p, count); }

inline Vec Read(const uint16_t* p, int64_t count) {
  HalfVec bits = {};
  if (count >= kLanes)
    bits = Load<HalfVec>(p);
  else
    std::memcpy(&bits, p, count * sizeof(uint16_t));
  return (Vec)(__builtin_convertvector(bits, IntVec) << 16);
}

inline void Write(float* p, Vec x, int64_t count) {
  if (count >= kLanes) return Store(p, x);
  std::memcpy(p, &x, count * sizeof(float));
}

inline void Write(uint16_t* p, Vec x, int64_t count) {
  const HalfVec bits = __builtin_convertvector((UIntVec)BFloat16::Rounded(x), HalfVec);
  if (count >= kLanes) return Store(p, bits);
  std::memcpy(p, &bits, count * sizeof(uint16_t));
}

// Channels `first + i` and `first + half + i` turned by an angle each; both may be one row.
template <typename T>
void Turn(const T* from, T* to, const float* cos, const float* sin, int64_t first, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i, low = first + i, high = low + half;
    const Vec a = Read(from + low, left), b = Read(from + high, left);
    const Vec c = Numbers(cos + i, left), s = Numbers(sin + i, left);
    Write(to + low, a * c - b * s, left);
    Write(to + high, b * c + a * s, left);
  }
}

struct Shape {
  int64_t pages, heads, page_size, width;

  explicit Shape(ffi::AnyBuffer::Dimensions d)
      : pages(d[0]), heads(d[1]), page_size(d[2]), width(d[3]) {}

  int64_t At(int64_t slot, int64_t head) const {
    return ((slot / page_size * heads + head) * page_size + slot % page_size) * width;
  }
};

struct Slots {
  const int32_t *from, *to;  // a destination of -1 is padding
  int64_t count;

  // Whether a slot is read for one token and written for another.
  bool Overlap(int64_t num_slots) const {
    std::vector<bool> written(num_slots);
    for (int64_t t = 0; t < count; ++t)
      if (to[t] >= 0) written[to[t]] = true;
    for (int64_t t = 0; t < count; ++t)
      if (to[t] >= 0 && from[t] != to[t] && written[from[t]]) return true;
    return false;
  }
};

constexpr int64_t kTokens = 64;  // of a task

// One pool, and what its rows were if they have been put aside.
template <typename T>
struct Pool {
  T* rows;
  Shape shape;
  std::vector<T> aside;

  Pool(ffi::AnyBuffer buffer, int64_t put_aside)
      : rows(static_cast<T*>(buffer.untyped_data())),
        shape(buffer.dimensions()),
        aside(put_aside * shape.heads * shape.width) {}

  void PutAside(int64_t token, int64_t slot) {
    for (int64_t h = 0; h < shape.heads; ++h)
      std::memcpy(&aside[(token * shape.heads + h) * shape.width], rows + shape.At(slot, h),
                  shape.width * sizeof(T));
  }

  // Calls `row(row to read, row to write)` for every head.
  template <typename Row>
  void Move(int64_t token, int64_t from, int64_t to, Row row) const {
    for (int64_t h = 0; h < shape.heads; ++h)
      row(aside.empty() ? rows + shape.At(from, h) : &aside[(token * shape.heads + h) * shape.width],
          rows + shape.At(to, h));
  }
};

template <typename T>
void Move(ffi::ThreadPool& threads, ffi::AnyBuffer k, ffi::AnyBuffer v, Slots slots,
          const float* cos, const float* sin, int64_t half, int64_t first) {
  const Shape keys(k.dimensions());
  const bool has_values = v.element_count() > 0;
  const int64_t put_aside = slots.Overlap(keys.pages * keys.page_size) ? slots.count : 0;
  Pool<T> k_pool(k, put_aside), v_pool(v, has_values ? put_aside : 0);
  for (int64_t t = 0; t < put_aside; ++t) {
    if (slots.to[t] < 0) continue;
    k_pool.PutAside(t, slots.from[t]);
    if (has_values) v_pool.PutAside(t, slots.from[t]);
  }
  const Pool<T>*key_rows = &k_pool, *value_rows = &v_pool;  // outlive the tasks: all are waited for
  const int64_t after = first + 2 * half, k_width = keys.width, v_width = v_pool.shape.width;
  Parallel(threads, CeilDiv(slots.count, kTokens), [=](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(slots.count, (task + 1) * kTokens); ++t) {
      const int64_t from = slots.from[t], to = slots.to[t];
      if (to < 0) continue;
      key_rows->Move(t, from, to, [=](const T* x, T* y) {
        if (x != y && first) std::memcpy(y, x, first * sizeof(T));
        if (x != y && after < k_width)
          std::memcpy(y + after, x + after, (k_width - after) * sizeof(T));
        Turn(x, y, cos + t * half, sin + t * half, first, half);
      });
      if (!has_values) continue;
      value_rows->Move(t, from, to, [=](const T* x, T* y) {
        if (x != y) std::memcpy(y, x, v_width * sizeof(T));
      });
    }
  });
}

// `new_k` and `new_v` are `k` and `v`: they are updated where they are.
ffi::Error Reposition(ffi::ThreadPool pool, ffi::AnyBuffer k, ffi::AnyBuffer v,
                      ffi::Buffer<ffi::S32> src, ffi::Buffer<ffi::S32> dst,
                      ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                      ffi::Result<ffi::AnyBuffer> new_k, ffi::Result<ffi::AnyBuffer> new_v,
                      int32_t rotary_offset) {
  if (new_k->untyped_data() != k.untyped_data() || new_v->untyped_data() != v.untyped_data())
    return ffi::Error(ffi::ErrorCode::kInternal, "the pools were not given in place");
  const Slots slots{src.typed_data(), dst.typed_data(), src.dimensions()[0]};
  const auto move = k.element_type() == ffi::F32 ? Move<float> : Move<uint16_t>;
  move(pool, k, v, slots, cos.typed_data(), sin.typed_data(), cos.dimensions()[1], rotary_offset);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvjax_reposition, Reposition,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("rotary_offset"));
