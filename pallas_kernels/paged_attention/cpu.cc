// Paged attention on a CPU, straight from the pages: an XLA FFI handler.
//
// A unit of work is a tile of query tokens and one KV head. It walks the keys that the tile can see
// in blocks of 64, counted from the start of the sequence. A block is unpacked to words once
// (cpu_pages.h), then the rows of the tile go through the same register kernels, up to six at a time,
// whether they come from a prefill or from a decode. A score is one chain of multiply-adds over the
// channels, an output one per block over the keys, so a row's bits depend on nothing but its own
// query, its interval and its KV.
//
// Sequences whose block tables begin with the same pages share a tile: it walks the blocks of those
// pages once for all of its rows, then the rest of each sequence for that sequence's rows alone. It
// is the same walk for a row, in the same order, so sharing changes no bit (and needs no merging).
//
// The softmax is the online one (FlashAttention-2, 2307.08691, section 3.1).

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu_pages.h"

namespace {

using namespace kvjax;

// Rows, and vectors of keys or channels, in a register kernel: 24 sums of 32 registers with AVX-512,
// 12 of 16 with AVX, 16 of 32 on ARM.
constexpr int kRows = kLanes == 4 ? 4 : 6, kVectors = kLanes == 8 ? 2 : 4;
constexpr int kWide = kVectors * kLanes;
constexpr int kTileRows = 96;       // rows of a tile, unless one token alone brings more
constexpr int kTilesPerThread = 2;  // at least, or threads would wait for each other
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
inline void WithConstant(int n, F f) {
  if constexpr (N > 1) {
    if (n < N) return WithConstant<N - 1>(n, f);
  }
  f(std::integral_constant<int, N>{});
}

// scores[r][b] = sum over d of q[r][d] * keys[d][b], for R rows and V vectors of b.
template <typename Kind, int R, int V>
void Scores(const Word* q, int64_t stride, const Word* keys, int words, float* scores) {
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
void Absorb(const Word* p, const Word* values, int words, int width, const float* scale,
            float* out) {
  Vec sum[R][V] = {};
  for (int b = 0; b < words; ++b)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = Kind::Step(sum[r][v], p[r * kBlock + b], values + b * width + v * kLanes);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* to = out + r * width + v * kLanes;
      Store(to, Load(to) * scale[r] + sum[r][v]);
    }
  }
}

struct Row {
  int64_t token;
  int lo, hi;           // the visible interval, cut to what is written
  int len;              // slots written in its sequence
  float top = -kInf;    // running maximum
  Vec normaliser = {};  // running sums of exp(score - top), one for each lane of keys
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
  int count;
  const Word* queries;
  float* acc;
  Row* state;
  Mask* masks;
};

// The arguments of one call. Shapes are those of `kvjax.pallas_kernels.paged_attention`.
template <typename T>
struct Attention {
  using Kind = KindOf<T>;

  const float* q;
  const T *k, *v;
  const float *k_scale, *v_scale;  // one per slot and head where kScaled<T>
  const int32_t *tables, *starts, *lens, *lo, *hi;
  const uint32_t* tail_mask;
  const float* sinks;
  float *out, *lse;
  int64_t tokens, seqs, kv_heads, group, page_size, table_width, tail_words;
  int k_width, v_width, v_stride;  // channels
  int k_words, v_padded;           // words of a key; channels of a value in whole vectors
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
    const int tail = row.len - 32 * static_cast<int>(tail_words);  // index of the tail's first bit
    for (int b = std::max(tail - first, from); b < to; ++b) {
      const int j = first + b - tail;
      if (!(tail_mask[row.token * tail_words + j / 32] >> (j % 32) & 1)) mask &= ~(Mask{1} << b);
    }
    return mask;
  }

  // The slots of the block that starts at index `first`, of those that `seen` marks.
  void Locate(int seq, int head, int first, Mask seen, Slots<T>& slots) const {
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
  // no hardware guesses them; back to back the misses overlap, between the work of unpacking they
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

  // Turns R rows of scores into words of weights, `factor` into what their earlier outputs are to be
  // scaled by.
  template <int R>
  void Weigh(Row* rows, const Mask* masks, const float* scores, Word* weights,
             float* factor) const {
    constexpr int kBlockVectors = kBlock / kLanes;
    Vec s[R][kBlockVectors], before = {}, after = {};
    for (int r = 0; r < R; ++r) {
      Vec highest = Splat(rows[r].top);
      for (int v = 0; v < kBlockVectors; ++v) {
        Vec x = Load(scores + r * kBlock + v * kLanes);
        if (soft_cap > 0) x = soft_cap * Tanh(x / soft_cap);
        if (masks[r] != ~Mask{0}) x = Lanes(masks[r] >> (v * kLanes), AllLanes()) ? x : Splat(-kInf);
        highest = Larger(x, highest);
        s[r][v] = x;
      }
      before[r] = rows[r].top;
      rows[r].top = after[r] = Joined(highest, Larger);
    }
    const Vec base = after == -kInf ? Vec{} : after, factors = Exp(before - base);
    for (int r = 0; r < R; ++r) {
      float p[kBlock];
      Vec sum = {};
      for (int v = 0; v < kBlockVectors; ++v) {
        const Vec x = Exp(s[r][v] - base[r]);
        sum += x;
        Store(p + v * kLanes, x);
      }
      rows[r].normaliser = rows[r].normaliser * factors[r] + sum;
      factor[r] = factors[r];
      for (int v = 0; v < kBlockVectors; v += Kind::kPerWord)
        Store(weights + r * kBlock + v / Kind::kPerWord * kLanes, Kind::Words(p + v * kLanes));
    }
  }

  // Takes R rows through one block, of which they see at most the first `vectors` vectors of keys.
  template <int R>
  void Take(const Rows& rows, int vectors, const Word* keys, const Word* values) const {
    float scores[R * kBlock] = {}, factor[R];
    Word weights[R * kBlock];
    for (int v = 0; v < vectors; v += kVectors) {
      WithConstant<kVectors>(vectors - v, [&](auto constant) {
        Scores<Kind, R, constant>(rows.queries, k_words, keys + v * kLanes, k_words,
                                  scores + v * kLanes);
      });
    }
    Weigh<R>(rows.state, rows.masks, scores, weights, factor);
    const int words = RoundUp(vectors, Kind::kPerWord) / Kind::kPerWord * kLanes;
    for (int c = 0; c < v_padded; c += kWide) {
      WithConstant<kVectors>((v_padded - c) / kLanes, [&](auto constant) {
        Absorb<Kind, R, constant>(weights, values + c, words, v_padded, factor, rows.acc + c);
      });
    }
  }

  Rows From(const Rows& rows, int first, int count) const {
    return {count, rows.queries + first * k_words, rows.acc + first * v_padded, rows.state + first,
            rows.masks + first};
  }

  // Takes all rows through the blocks of the indices `[begin, end)` that some of them see, found
  // through the table of `seq`. `begin` and `end` are block ends, or nothing lies behind `end`.
  void Walk(const Rows& rows, int seq, int head, int begin, int end, Word* keys) const {
    Word* values = keys + KeyRoom();
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
      for (int i = 0; i < rows.count; ++i) seen |= rows.masks[i] = Visible(rows.state[i], first);
      Slots<T> slots;
      Locate(seq, head, first, seen, slots);
      Touch(seq, head, first, highest);
      UnpackKeys(slots, k_width, keys);
      UnpackValues(slots, v_width, v_padded, values);
      for (int i = 0; i < rows.count; i += kRows) {
        const Rows some = From(rows, i, std::min(rows.count - i, kRows));
        Mask any = 0;
        for (int r = 0; r < some.count; ++r) any |= some.masks[r];
        if (any == 0) continue;
        const int vectors = (kBlock - 1 - __builtin_clzll(any)) / kLanes + 1;
        WithConstant<kRows>(some.count,
                            [&](auto n) { Take<decltype(n)::value>(some, vectors, keys, values); });
      }
    }
  }

  int64_t KeyRoom() const { return RoundUp(k_words, kLanes) * kBlock; }

  // The rows of a member, and its queries as words.
  void Gather(const Member& member, int head, Row* state, Word* queries) const {
    constexpr int kStep = kLanes * Kind::kPerWord;
    const int len = lens[member.seq];
    for (int i = 0; i < member.tokens * group; ++i) {
      const int64_t t = member.first + i / group;
      state[i] = {t, std::max(lo[t], 0), std::min(hi[t], len), len};
      const float* from = q + (t * kv_heads * group + head * group + i % group) * k_width;
      for (int d = 0; d < k_width; d += kStep) {
        float numbers[kStep];
        for (int j = 0; j < kStep; j += kLanes)
          Store(numbers + j, scale * Numbers(from + d + j, std::max(k_width - d - j, 0)));
        const IntVec words = Kind::Words(numbers);
        const int at = d / Kind::kPerWord, count = std::min(k_words - at, kLanes);
        std::memcpy(queries + i * k_words + at, &words, count * sizeof(Word));
      }
    }
  }

  void Run(const Tile& tile) const {
    int count = 0;
    for (int m = 0; m < tile.num_members; ++m) count += tile.members[m].tokens * group;
    thread_local std::vector<Word> block, queries;
    thread_local std::vector<float> acc;
    thread_local std::vector<Row> state;
    thread_local std::vector<Mask> masks;
    block.resize(KeyRoom() + kBlock * v_padded);
    queries.resize(count * k_words);
    acc.assign(count * v_padded, 0.0f);
    state.resize(count);
    masks.resize(count);

    for (int m = 0, at = 0; m < tile.num_members; ++m) {
      Gather(tile.members[m], tile.head, &state[at], &queries[at * k_words]);
      at += tile.members[m].tokens * group;
    }
    const Rows all = {count, queries.data(), acc.data(), state.data(), masks.data()};
    if (tile.shared > 0) Walk(all, tile.members[0].seq, tile.head, 0, tile.shared, block.data());
    for (int m = 0, at = 0; m < tile.num_members; ++m) {
      const Member& member = tile.members[m];
      const Rows own = From(all, at, member.tokens * group);
      Walk(own, member.seq, tile.head, tile.shared, std::max(tile.shared, lens[member.seq]),
           block.data());
      at += own.count;
    }
    for (int i = 0; i < count; ++i) Finish(state[i], tile.head, i % group, &acc[i * v_padded]);
  }

  void Finish(const Row& row, int kv_head, int64_t g, const float* acc) const {
    const int64_t head = kv_head * group + g, at = row.token * kv_heads * group + head;
    float top = row.top, factor = 1;
    float normaliser = Joined(row.normaliser, [](Vec a, Vec b) { return a + b; });
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
    a.tail_words = tail_mask.dimensions()[1];
    a.k_width = static_cast<int>(pages[3]);
    a.v_width = static_cast<int>(out->dimensions()[2]);
    a.k_words = RoundUp(a.k_width, KindOf<T>::kPerWord) / KindOf<T>::kPerWord;
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
