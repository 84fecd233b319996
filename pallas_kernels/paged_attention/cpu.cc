// Paged attention on a CPU, straight from the pages: an XLA FFI handler.
//
// A unit of work is a tile of query tokens and one KV head. It walks the keys that the tile can see
// in blocks of 64, counted from the start of the sequence. A block is unpacked to float32 once (keys
// transposed), then all rows of the tile go through the same register kernels, four rows at a time,
// whether they come from a prefill or from a decode. A score is one chain of multiply-adds over the
// channels, an output one over the keys, so a row's bits depend on nothing but its own query, its
// interval and its KV.
//
// Sequences whose block tables begin with the same pages share a tile: it walks the blocks of those
// pages once for all of its rows, then the rest of each sequence for that sequence's rows alone. It
// is the same walk for a row, in the same order, so sharing changes no bit (and needs no merging).
//
// The softmax is the online one (FlashAttention-2, 2307.08691, section 3.1).

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "native.h"

namespace {

using namespace kvjax;

constexpr int kVectors = 4;                // vectors of a row in a register kernel
constexpr int kBlock = kLanes * kVectors;  // keys in a block: one bit each in a Mask
constexpr int kRows = 4;                   // rows in a register kernel
constexpr int kTileRows = 64;              // rows of a tile, unless one token alone brings more
constexpr int kTilesPerThread = 2;         // at least, or threads would wait for each other
constexpr float kInf = std::numeric_limits<float>::infinity();

using Mask = uint64_t;
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint8_t Float8Vec __attribute__((vector_size(kLanes)));

// Pages of single bytes carry a scale per slot and head.
template <typename T>
constexpr bool kScaled = sizeof(T) == 1;

// Sixteen numbers of a page, which holds float32, the bits of bfloat16 (uint16), int8 or the bits of
// float8_e4m3fn (uint8), the last two without their scale.
inline Vec PageNumbers(const float* p) { return Load(p); }

inline Vec PageNumbers(const uint16_t* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  return (Vec)(__builtin_convertvector(half, IntVec) << 16);
}

inline Vec PageNumbers(const int8_t* p) {
  ByteVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
}

inline Vec PageNumbers(const uint8_t* p) {
  Float8Vec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const IntVec bits = __builtin_convertvector(bytes, IntVec), size = bits & 0x7f;
  // Seven bits of exponent and mantissa; subnormals are counted, as XLA's threads flush them.
  const Vec normal = (Vec)((size << 20) + (120 << 23));
  const Vec subnormal = __builtin_convertvector(size, Vec) * 0x1p-9f;
  Vec x = size < 8 ? subnormal : normal;
  x = size == 0x7f ? Splat(std::numeric_limits<float>::quiet_NaN()) : x;
  return (Vec)((IntVec)x | ((bits & 0x80) << 24));
}

// The same of the last `count` channels, with zeros behind them.
template <typename T>
inline Vec PageNumbers(const T* p, int count) {
  if (count >= kLanes) return PageNumbers(p);
  T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return PageNumbers(padded);
}

// The sum over the lanes, as a tree.
inline float Sum(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// The lowest sixteen bits of a mask, a lane each.
inline IntVec Lanes(Mask mask) {
  const IntVec bits = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                       1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return (bits & (IntVec{} + static_cast<int32_t>(mask & 0xffff))) != 0;
}

// Swaps the off-diagonal halves of every 2*S x 2*S square; S = 8, 4, 2, 1 transpose 16 x 16.
template <int S, int... I>
inline void Exchange(Vec (&a)[kLanes], std::integer_sequence<int, I...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vec x = a[i], y = a[i + S];
    a[i] = __builtin_shufflevector(x, y, (I & S ? kLanes + I - S : I)...);
    a[i + S] = __builtin_shufflevector(x, y, (I & S ? kLanes + I : I + S)...);
  }
}

inline void Transpose(Vec (&a)[kLanes]) {
  const std::make_integer_sequence<int, kLanes> lanes;
  Exchange<8>(a, lanes);
  Exchange<4>(a, lanes);
  Exchange<2>(a, lanes);
  Exchange<1>(a, lanes);
}

// scores[r][b] = sum over d of q[r][d] * keys[d][b].
inline void Scores(const float* q, const float* keys, int width, float* scores) {
  Vec sum[kRows][kVectors] = {};
  for (int d = 0; d < width; ++d) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec k = Load(keys + d * kBlock + v * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][v] += q[r * width + d] * k;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) Store(scores + r * kBlock + v * kLanes, sum[r][v]);
}

// out[r][c] = out[r][c] * scale[r] + sum over b of p[r][b] * values[b][c], for N vectors of c.
template <int N>
inline void Absorb(const float* p, const float* values, int width, const float* scale, float* out) {
  Vec sum[kRows][N];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < N; ++v) sum[r][v] = Load(out + r * width + v * kLanes) * scale[r];
  for (int b = 0; b < kBlock; ++b) {
    for (int v = 0; v < N; ++v) {
      const Vec x = Load(values + b * width + v * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][v] += p[r * kBlock + b] * x;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < N; ++v) Store(out + r * width + v * kLanes, sum[r][v]);
}

struct Row {
  int64_t token;
  int lo, hi;            // the visible interval, cut to what is written
  int len;               // slots written in its sequence
  float top = -kInf;     // running maximum
  float normaliser = 0;  // running sum of exp(score - top)
};

// Query tokens of one sequence.
struct Member {
  int seq;
  int64_t first, tokens;
};

// Members that walk their first `shared` indices (whole blocks) together.
struct Group {
  std::vector<Member> members;
  int shared = 0;
};

struct Tile {
  const Member* members;
  int num_members, shared, head;
};

// Rows on their way through the keys: queries, what they have gathered, and their masks.
struct Rows {
  int count, padded;  // padded to whole register kernels
  float *queries, *acc;
  Row* state;
  Mask* masks;
};

// The arguments of one call. Shapes are those of `kvjax.pallas_kernels.paged_attention`.
template <typename T>
struct Attention {
  const float* q;
  const T *k, *v;
  const float *k_scale, *v_scale;  // one per slot and head where kScaled<T>
  const int32_t *tables, *starts, *lens, *lo, *hi;
  const uint32_t* tail_mask;
  const float* sinks;
  float *out, *lse;
  int64_t tokens, seqs, kv_heads, group, page_size, table_width, words;
  int k_width, v_width, v_stride;  // channels
  int k_padded, v_padded;          // the same in whole vectors
  float scale, soft_cap;
  bool has_sinks;

  // Indices of whole blocks that `a` and `b` keep on the same pages from the start.
  int Common(int a, int b) const {
    const int32_t *x = tables + a * table_width, *y = tables + b * table_width;
    const int64_t pages = (std::min(lens[a], lens[b]) + page_size - 1) / page_size;
    const int64_t same = std::mismatch(x, x + pages, y).first - x;
    return static_cast<int>(same * page_size / kBlock * kBlock);
  }

  // Puts a sequence where fewer blocks are walked for it; in a group of its own otherwise.
  void Join(const Member& member, std::vector<Group>& groups) const {
    const int64_t rows = member.tokens * group;
    for (Group& g : groups) {
      const int others = static_cast<int>(g.members.size());
      int common = Common(g.members[0].seq, member.seq);
      if (others > 1) common = std::min(common, g.shared);
      if (common == 0 || others * common < (others - 1) * g.shared) continue;
      if (rows > kTileRows / 2) continue;  // its own rows pay for its keys
      g.members.push_back(member);
      g.shared = common;
      return;
    }
    groups.push_back({{member}});
  }

  // A group becomes as many tiles as keep the threads busy, none of more than `kTileRows` rows
  // unless one token alone brings more.
  std::vector<Tile> Tiles(const std::vector<Group>& groups, int64_t threads) const {
    const int64_t whole = std::max<int64_t>(1, groups.size() * kv_heads);
    const int64_t parts = (kTilesPerThread * threads + whole - 1) / whole;
    std::vector<Tile> tiles;
    for (const Group& g : groups) {
      const int64_t members = g.members.size(), most = (members + parts - 1) / parts;
      for (int64_t i = 0; i < members;) {
        int64_t n = 0, rows = 0;
        while (n < most && i + n < members) {
          rows += g.members[i + n].tokens * group;
          if (n > 0 && rows > kTileRows) break;
          ++n;
        }
        for (int h = 0; h < kv_heads; ++h)
          tiles.push_back({&g.members[i], static_cast<int>(n), n > 1 ? g.shared : 0, h});
        i += n;
      }
    }
    return tiles;
  }

  std::vector<Group> Groups() const {
    std::vector<Group> together, alone;
    const int64_t size = std::max<int64_t>(1, kTileRows / group);
    for (int s = 0; s < seqs; ++s) {
      if (starts[s + 1] - starts[s] <= size && starts[s] < starts[s + 1]) {
        Join({s, starts[s], starts[s + 1] - starts[s]}, together);
        continue;
      }
      for (int64_t t = starts[s]; t < starts[s + 1]; t += size)
        alone.push_back({{{s, t, std::min<int64_t>(size, starts[s + 1] - t)}}});
    }
    alone.insert(alone.end(), together.begin(), together.end());
    return alone;
  }

  // Which keys of the block that starts at index `first` the row sees.
  Mask Visible(const Row& row, int first) const {
    const int from = std::max(row.lo - first, 0), to = std::min(row.hi - first, kBlock);
    if (from >= to) return 0;
    Mask mask = (~Mask{0} >> (kBlock - (to - from))) << from;
    const int tail = row.len - 32 * static_cast<int>(words);  // index of the tail's first bit
    for (int b = std::max(tail - first, from); b < to; ++b) {
      const int j = first + b - tail;
      if (!(tail_mask[row.token * words + j / 32] >> (j % 32) & 1)) mask &= ~(Mask{1} << b);
    }
    return mask;
  }

  // Where the keys and values of a block begin: null where no row of the tile looks.
  struct Slots {
    const T *k[kBlock], *v[kBlock];
    float k_scale[kBlock], v_scale[kBlock];
  };

  // The slots of the block that starts at index `first`, of those that `seen` marks.
  void Locate(int seq, int head, int first, Mask seen, Slots& slots) const {
    const int32_t* table = tables + seq * table_width;
    int64_t page = first / page_size, offset = first % page_size;
    for (int b = 0; b < kBlock; ++b) {
      if (seen >> b & 1) {
        const int64_t slot = (table[page] * kv_heads + head) * page_size + offset;
        slots.k[b] = k + slot * k_width;
        slots.v[b] = v + slot * v_stride;
        if constexpr (kScaled<T>) {
          slots.k_scale[b] = k_scale[slot];
          slots.v_scale[b] = v_scale[slot];
        }
      } else {
        slots.k[b] = slots.v[b] = nullptr;
      }
      if (++offset == page_size) offset = 0, ++page;
    }
  }

  // Reads a byte of every cache line of the block that starts at index `first`. Pages lie apart, so
  // no hardware guesses them; back to back the misses overlap, between the work of `Unpack` they
  // do not. (14 ms became 8 for 30 layers of 8 x 576 bfloat16 keys; prefetches changed nothing.)
  void Touch(int seq, int head, int first, int end) const {
    const int32_t* table = tables + seq * table_width;
    const auto touch = [](const T* p, int64_t count) {
      const char* from = reinterpret_cast<const char*>(p);
      for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64)
        asm volatile("" : : "r"(static_cast<int32_t>(from[i])));
    };
    for (int64_t i = first; i < std::min(first + kBlock, end);) {
      const int64_t page = i / page_size, offset = i % page_size;
      const int64_t count = std::min(page_size - offset, first + kBlock - i);
      const int64_t slot = (table[page] * kv_heads + head) * page_size + offset;
      touch(k + slot * k_width, count * k_width);
      if (v != k) touch(v + slot * v_stride, count * v_stride);
      i += count;
    }
  }

  // Sixteen channels from `first` on of one row; zeros where nobody looks.
  static Vec Read(const T* row, int first, int width, float scale) {
    if (row == nullptr) return Vec{};
    const Vec x = PageNumbers(row + first, width - first);
    if constexpr (kScaled<T>) return x * scale;
    return x;
  }

  // Keys as [channels, kBlock] and values as [kBlock, channels], channels in whole vectors; zeros
  // where nobody looks.
  void Unpack(const Slots& slots, float* keys, float* values) const {
    for (int j = 0; j < kBlock; j += kLanes) {
      for (int d = 0; d < k_width; d += kLanes) {
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i)
          square[i] = Read(slots.k[j + i], d, k_width, slots.k_scale[j + i]);
        Transpose(square);
        for (int i = 0; i < kLanes; ++i) Store(keys + (d + i) * kBlock + j, square[i]);
      }
    }
    for (int b = 0; b < kBlock; ++b)
      for (int c = 0; c < v_width; c += kLanes)
        Store(values + b * v_padded + c, Read(slots.v[b], c, v_width, slots.v_scale[b]));
  }

  // Turns a row's scores into weights; returns what its earlier output is to be scaled by.
  float Weigh(Row& row, Mask mask, float* scores) const {
    Vec s[kVectors], highest = Splat(row.top);
    for (int v = 0; v < kVectors; ++v) {
      s[v] = Load(scores + v * kLanes);
      if (soft_cap > 0) s[v] = soft_cap * Tanh(s[v] / soft_cap);
      if (mask != ~Mask{0}) s[v] = Lanes(mask >> (v * kLanes)) ? s[v] : Splat(-kInf);
      highest = s[v] > highest ? s[v] : highest;
    }
    float top = row.top;
    for (int i = 0; i < kLanes; ++i) top = std::max(top, highest[i]);
    const float base = top == -kInf ? 0 : top;
    const float scale = row.top == -kInf ? 0 : Exp(row.top - base);
    Vec sum = {};
    for (int v = 0; v < kVectors; ++v) {
      s[v] = Exp(s[v] - base);
      sum += s[v];
      Store(scores + v * kLanes, s[v]);
    }
    row.top = top;
    row.normaliser = row.normaliser * scale + Sum(sum);
    return scale;
  }

  // Takes all rows through the blocks of the indices `[begin, end)` that some of them see, found
  // through the table of `seq`. `begin` and `end` are block ends, or nothing lies behind `end`.
  void Walk(const Rows& rows, int seq, int head, int begin, int end, float* scratch) const {
    float *keys = scratch, *values = scratch + kBlock * k_padded;
    int lowest = end, highest = begin;
    for (int i = 0; i < rows.count; ++i) {
      const Row& row = rows.state[i];
      if (row.lo >= row.hi) continue;
      lowest = std::min(lowest, row.lo);
      highest = std::max(highest, row.hi);
    }
    lowest = std::max(lowest, begin);
    highest = std::min(highest, end);
    for (int first = lowest / kBlock * kBlock; first < highest; first += kBlock) {
      Mask seen = 0;
      for (int i = 0; i < rows.padded; ++i) seen |= rows.masks[i] = Visible(rows.state[i], first);
      Slots slots;
      Locate(seq, head, first, seen, slots);
      Touch(seq, head, first, highest);
      Unpack(slots, keys, values);
      for (int i = 0; i < rows.padded; i += kRows) Take(rows, i, keys, values);
    }
  }

  // Takes the rows `[i, i + kRows)` through one block.
  void Take(const Rows& rows, int i, const float* keys, const float* values) const {
    float weights[kRows * kBlock], factor[kRows];
    Scores(rows.queries + i * k_padded, keys, k_padded, weights);
    for (int r = 0; r < kRows; ++r)
      factor[r] = Weigh(rows.state[i + r], rows.masks[i + r], weights + r * kBlock);
    float* acc = rows.acc + i * v_padded;
    int c = 0;
    for (; c + kBlock <= v_padded; c += kBlock)
      Absorb<kVectors>(weights, values + c, v_padded, factor, acc + c);
    for (; c < v_padded; c += kLanes)
      Absorb<1>(weights, values + c, v_padded, factor, acc + c);
  }

  // Rows in zeroed memory of `RoomFor(count)` floats and as many states and masks.
  Rows Place(int count, float* memory, Row* state, Mask* masks) const {
    const int padded = RoundUp(count, kRows);
    return {count, padded, memory, memory + padded * k_padded, state, masks};
  }
  int64_t RoomFor(int count) const { return RoundUp(count, kRows) * (k_padded + v_padded); }

  void Gather(const Member& member, int head, const Rows& rows, int at) const {
    const int len = lens[member.seq];
    for (int i = 0; i < member.tokens * group; ++i) {
      const int64_t t = member.first + i / group;
      rows.state[at + i] = {t, std::max(lo[t], 0), std::min(hi[t], len), len};
      const float* from = q + (t * kv_heads * group + head * group + i % group) * k_width;
      float* to = rows.queries + (at + i) * k_padded;
      for (int d = 0; d < k_width; ++d) to[d] = from[d] * scale;
    }
  }

  void Run(const Tile& tile) const {
    int count = 0, most = 0;
    for (int m = 0; m < tile.num_members; ++m) {
      const int rows = static_cast<int>(tile.members[m].tokens * group);
      count += rows;
      if (tile.num_members > 1) most = std::max(most, rows);
    }
    const int64_t padded = RoundUp(count, kRows) + RoundUp(most, kRows);
    thread_local std::vector<float> memory, block;
    thread_local std::vector<Row> state;
    thread_local std::vector<Mask> masks;
    memory.assign(RoomFor(count) + RoomFor(most), 0.0f);
    block.resize(size_t(kBlock) * (k_padded + v_padded));
    state.assign(padded, Row{0, 0, 0, 0});
    masks.resize(padded);

    const Rows all = Place(count, memory.data(), state.data(), masks.data());
    for (int m = 0, at = 0; m < tile.num_members; ++m) {
      Gather(tile.members[m], tile.head, all, at);
      at += tile.members[m].tokens * group;
    }
    if (tile.shared > 0) Walk(all, tile.members[0].seq, tile.head, 0, tile.shared, block.data());
    if (tile.num_members == 1) return Rest(tile, tile.members[0], all, block.data());
    for (int m = 0, at = 0; m < tile.num_members; ++m) {
      const int rows = static_cast<int>(tile.members[m].tokens * group);
      const Rows own = Place(rows, memory.data() + RoomFor(count), state.data() + all.padded,
                             masks.data() + all.padded);
      // Apart, and not beside the others' rows: what only this sequence sees must not meet them.
      std::copy_n(all.queries + at * k_padded, rows * k_padded, own.queries);
      std::copy_n(all.acc + at * v_padded, rows * v_padded, own.acc);
      std::copy_n(all.state + at, rows, own.state);
      for (int i = rows; i < own.padded; ++i) {
        own.state[i] = Row{0, 0, 0, 0};
        std::fill_n(own.acc + i * v_padded, v_padded, 0.0f);
      }
      Rest(tile, tile.members[m], own, block.data());
      at += rows;
    }
  }

  // What a member does not share, and its results.
  void Rest(const Tile& tile, const Member& member, const Rows& rows, float* block) const {
    Walk(rows, member.seq, tile.head, tile.shared, std::max(tile.shared, lens[member.seq]), block);
    for (int i = 0; i < rows.count; ++i)
      Finish(rows.state[i], tile.head, i % group, rows.acc + i * v_padded);
  }

  void Finish(const Row& row, int kv_head, int64_t g, const float* acc) const {
    const int64_t head = kv_head * group + g, at = row.token * kv_heads * group + head;
    float top = row.top, normaliser = row.normaliser, factor = 1;
    if (has_sinks) {
      top = std::max(top, sinks[head]);
      factor = row.top == -kInf ? 0 : Exp(row.top - top);
      normaliser = normaliser * factor + Exp(sinks[head] - top);
    }
    const bool nothing = top == -kInf;
    for (int c = 0; c < v_width; ++c)
      out[at * v_width + c] = nothing ? 0 : acc[c] * factor / normaliser;
    lse[at] = nothing ? -kInf : top + std::log(normaliser);
  }

  void ZeroPadding() const {
    const int64_t heads = kv_heads * group, from = starts[seqs] * heads, to = tokens * heads;
    std::fill(out + from * v_width, out + to * v_width, 0.0f);
    std::fill(lse + from, lse + to, 0.0f);
  }
};

ffi::Error PagedAttention(
    ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
    ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale,
    ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> lens,
    ffi::Buffer<ffi::S32> lo, ffi::Buffer<ffi::S32> hi, ffi::Buffer<ffi::U32> tail_mask,
    ffi::Buffer<ffi::F32> sinks, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> lse,
    float scale, float soft_cap) {
  const auto attend = [&](auto element) {
    using T = decltype(element);
    const auto queries = q.dimensions(), pages = k.dimensions();
    Attention<T> a;
    a.q = q.typed_data();
    a.k = static_cast<const T*>(k.untyped_data());
    a.v = static_cast<const T*>(v.untyped_data());
    a.k_scale = k_scale.typed_data();
    a.v_scale = v_scale.typed_data();
    a.tables = tables.typed_data();
    a.starts = starts.typed_data();
    a.lens = lens.typed_data();
    a.lo = lo.typed_data();
    a.hi = hi.typed_data();
    a.tail_mask = tail_mask.typed_data();
    a.sinks = sinks.typed_data();
    a.out = out->typed_data();
    a.lse = lse->typed_data();
    a.tokens = queries[0];
    a.seqs = tables.dimensions()[0];
    a.kv_heads = pages[1];
    a.group = queries[1] / pages[1];
    a.page_size = pages[2];
    a.table_width = tables.dimensions()[1];
    a.words = tail_mask.dimensions()[1];
    a.k_width = static_cast<int>(pages[3]);
    a.v_width = static_cast<int>(out->dimensions()[2]);
    a.k_padded = RoundUp(a.k_width, kLanes);
    a.v_padded = RoundUp(a.v_width, kLanes);
    a.v_stride = static_cast<int>(v.dimensions()[3]);
    a.scale = scale;
    a.soft_cap = soft_cap;
    a.has_sinks = sinks.element_count() > 0;
    a.ZeroPadding();
    const std::vector<Group> groups = a.Groups();
    const std::vector<Tile> tiles = a.Tiles(groups, pool.num_threads());
    Parallel(pool, tiles.size(), [&a, &tiles](int64_t i) { a.Run(tiles[i]); });
    return ffi::Error::Success();
  };
  if (k.element_type() == ffi::U16) return attend(uint16_t{});
  if (k.element_type() == ffi::F32) return attend(float{});
  if (k.element_type() == ffi::S8) return attend(int8_t{});
  if (k.element_type() == ffi::U8) return attend(uint8_t{});
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "pages must be f32, u16, s8 or u8");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kvjax_paged_attention, PagedAttention,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::U32>>()
        .Arg<ffi::Buffer<ffi::F32>>()
        .Ret<ffi::Buffer<ffi::F32>>()
        .Ret<ffi::Buffer<ffi::F32>>()
        .Attr<float>("scale")
        .Attr<float>("soft_cap"));
