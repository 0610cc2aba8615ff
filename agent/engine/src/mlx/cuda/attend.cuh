// Attention of one position of one sequence, from projected queries, keys and values on: rotates, puts the position's
// key and value into the caches' buffers, attends. A block serves all query heads of one key head, on one part of
// the positions; the block that is done last puts the parts together.

template <typename T>
struct alignas(16) Chunk {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};

template <typename T>
__device__ Chunk<T> chunk(const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  return *reinterpret_cast<const Chunk<T>*>(&bits);
}

// What a softmax over no scores has seen.
constexpr float LEAST = -1e30f;

// Heads of query and key, in the order in which one position's projections lie behind each other: queries, keys,
// values. `COUNT` threads; `PAIRS`: neighbours are turned together, else the two halves of a head.
template <typename T, int HEADS, int KEY_HEADS, int DIM, bool PAIRS, int COUNT>
struct Attention {
  static constexpr int GROUP = HEADS / KEY_HEADS;
  static constexpr int SIZE = Chunk<T>::SIZE;
  // Lanes that share a key, and keys that a warp and a block look at together.
  static constexpr int SPAN = DIM / SIZE;
  static constexpr int SLOTS = 32 / SPAN;
  static constexpr int WARPS = COUNT / 32;
  static constexpr int TOGETHER = WARPS * SLOTS;
  // Turns whose keys and values are asked for before the first is looked at.
  static constexpr int AHEAD = 4;
  // Numbers that a part leaves for each query: the weighted sum, the highest score, the sum of weights.
  static constexpr int LEFT = DIM + 2;
  static_assert(SPAN * SLOTS == 32 && SPAN * SIZE == DIM, "lanes share heads evenly");

  struct Shared {
    float queries[GROUP][DIM];
    float key[DIM];
    float sums[WARPS][GROUP][DIM];
    float highest[WARPS][GROUP];
    float weight[WARPS][GROUP];
    bool last;
  };

  // Turns this block's queries and key; rounded as they are kept.
  static __device__ void turn(
      Shared& shared, const T* heads, const float* periods, float position, int key_head) {
    constexpr int HALF = DIM / 2;
    for (int i = threadIdx.x; i < (GROUP + 1) * HALF; i += COUNT) {
      const int head = i / HALF, pair = i % HALF;
      const bool is_key = head == GROUP;
      const T* from = heads + (is_key ? HEADS + key_head : key_head * GROUP + head) * DIM;
      float* to = is_key ? shared.key : shared.queries[head];
      const int a = PAIRS ? 2 * pair : pair;
      const int b = PAIRS ? a + 1 : pair + HALF;
      const float angle = position * (1 / periods[pair]);
      const float cosine = cosf(angle), sine = sinf(angle);
      const float x = static_cast<float>(from[a]), y = static_cast<float>(from[b]);
      to[a] = static_cast<float>(static_cast<T>(x * cosine - y * sine));
      to[b] = static_cast<float>(static_cast<T>(x * sine + y * cosine));
    }
  }

  // Softmax over what was seen so far, for each query of the group: this lane's share of the weighted sum.
  struct Seen {
    float sums[GROUP][SIZE];
    float highest[GROUP];
    float weight[GROUP];
  };

  static __device__ void take_in(
      Seen& seen, const float (&query)[GROUP][SIZE], const Chunk<T> (&keys)[AHEAD],
      const Chunk<T> (&values)[AHEAD], const bool (&counts)[AHEAD]) {
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float scores[AHEAD];
      float highest = seen.highest[g];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        float score = 0;
#pragma unroll
        for (int j = 0; j < SIZE; ++j) {
          score += query[g][j] * static_cast<float>(keys[i].at[j]);
        }
#pragma unroll
        for (int lanes = SPAN / 2; lanes > 0; lanes /= 2) {
          score += __shfl_xor_sync(0xffffffff, score, lanes);
        }
        scores[i] = counts[i] ? score : LEAST;
        highest = fmaxf(highest, scores[i]);
      }
      const float keep = exp2f(seen.highest[g] - highest);
      seen.highest[g] = highest;
      seen.weight[g] *= keep;
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        seen.sums[g][j] *= keep;
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const float weight = counts[i] ? exp2f(scores[i] - highest) : 0;
        seen.weight[g] += weight;
#pragma unroll
        for (int j = 0; j < SIZE; ++j) {
          seen.sums[g][j] += weight * static_cast<float>(values[i].at[j]);
        }
      }
    }
  }

  // Joins what the slots of a warp have seen, and leaves it for the block.
  static __device__ void leave(Shared& shared, Seen& seen) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
      for (int lanes = SPAN; lanes < 32; lanes *= 2) {
        const float other = __shfl_xor_sync(0xffffffff, seen.highest[g], lanes);
        const float highest = fmaxf(seen.highest[g], other);
        const float own = exp2f(seen.highest[g] - highest), theirs = exp2f(other - highest);
        const float weight = __shfl_xor_sync(0xffffffff, seen.weight[g], lanes);
        seen.weight[g] = seen.weight[g] * own + weight * theirs;
        seen.highest[g] = highest;
#pragma unroll
        for (int j = 0; j < SIZE; ++j) {
          const float sum = __shfl_xor_sync(0xffffffff, seen.sums[g][j], lanes);
          seen.sums[g][j] = seen.sums[g][j] * own + sum * theirs;
        }
      }
      if (lane < SPAN) {
#pragma unroll
        for (int j = 0; j < SIZE; ++j) {
          shared.sums[warp][g][lane * SIZE + j] = seen.sums[g][j];
        }
      }
      if (lane == 0) {
        shared.highest[warp][g] = seen.highest[g];
        shared.weight[warp][g] = seen.weight[g];
      }
    }
  }

  // `heads`: [HEADS + 2 * KEY_HEADS, DIM]; `keys`, `values`: [KEY_HEADS, capacity, DIM], of which `position` are set;
  // `tickets`: [KEY_HEADS] zeros, which they are again when all blocks are done; `parts`: [KEY_HEADS, parts, GROUP,
  // LEFT]; `out`: [HEADS, DIM].
  static __device__ void run(
      const T* heads, T* keys, T* values, int capacity, const float* periods, int position,
      float turns, float scale, unsigned* tickets, float* parts, T* out) {
    __shared__ Shared shared;
    const int key_head = blockIdx.x, part = blockIdx.y, count = gridDim.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slot = lane / SPAN, feature = lane % SPAN * SIZE;
    turn(shared, heads, periods, position * turns, key_head);
    __syncthreads();

    Seen seen;
    float query[GROUP][SIZE];
    for (int g = 0; g < GROUP; ++g) {
      seen.highest[g] = LEAST;
      seen.weight[g] = 0;
      for (int j = 0; j < SIZE; ++j) {
        seen.sums[g][j] = 0;
        // Powers of 2 instead of e.
        query[g][j] = shared.queries[g][feature + j] * scale * 1.44269504f;
      }
    }

    keys += static_cast<size_t>(key_head) * capacity * DIM;
    values += static_cast<size_t>(key_head) * capacity * DIM;
    const T* value = heads + (HEADS + KEY_HEADS + key_head) * DIM;
    if (part == 0) {
      for (int i = threadIdx.x; i < DIM; i += COUNT) {
        keys[static_cast<size_t>(position) * DIM + i] = static_cast<T>(shared.key[i]);
        values[static_cast<size_t>(position) * DIM + i] = value[i];
      }
    }
    if (part == 0 && warp == 0) {
      Chunk<T> own[AHEAD], its[AHEAD];
      bool counts[AHEAD] = {slot == 0};
      for (int i = 0; i < AHEAD; ++i) {
        for (int j = 0; j < SIZE; ++j) {
          own[i].at[j] = static_cast<T>(shared.key[feature + j]);
        }
        its[i] = chunk(value + feature);
      }
      take_in(seen, query, own, its, counts);
    }

    const int each = (position + count - 1) / count;
    const int begin = part * each, end = min(position, begin + each);
    for (int first = begin + warp * SLOTS; first < end; first += TOGETHER * AHEAD) {
      Chunk<T> some[AHEAD], theirs[AHEAD];
      bool counts[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int index = first + i * TOGETHER + slot;
        counts[i] = index < end;
        // What does not count is read from a place that can be read.
        const size_t at = static_cast<size_t>(min(index, end - 1)) * DIM + feature;
        some[i] = chunk(keys + at);
        theirs[i] = chunk(values + at);
      }
      take_in(seen, query, some, theirs, counts);
    }
    leave(shared, seen);
    __syncthreads();

    float* own = parts + static_cast<size_t>(key_head * count + part) * GROUP * LEFT;
    for (int i = threadIdx.x; i < GROUP * DIM; i += COUNT) {
      const int g = i / DIM, d = i % DIM;
      float highest = LEAST, weight = 0, sum = 0;
      for (int w = 0; w < WARPS; ++w) {
        highest = fmaxf(highest, shared.highest[w][g]);
      }
      for (int w = 0; w < WARPS; ++w) {
        const float keep = exp2f(shared.highest[w][g] - highest);
        weight += shared.weight[w][g] * keep;
        sum += shared.sums[w][g][d] * keep;
      }
      if (count == 1) {
        out[(key_head * GROUP + g) * DIM + d] = static_cast<T>(sum / weight);
        continue;
      }
      own[g * LEFT + d] = sum;
      if (d == 0) {
        own[g * LEFT + DIM] = highest;
        own[g * LEFT + DIM + 1] = weight;
      }
    }
    if (count == 1) {
      return;
    }

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.last = atomicAdd(tickets + key_head, 1u) == count - 1;
    }
    __syncthreads();
    if (!shared.last) {
      return;
    }
    __threadfence();
    const float* all = parts + static_cast<size_t>(key_head) * count * GROUP * LEFT;
    for (int i = threadIdx.x; i < GROUP * DIM; i += COUNT) {
      const int g = i / DIM, d = i % DIM;
      float highest = LEAST, weight = 0, sum = 0;
      for (int p = 0; p < count; ++p) {
        const float* of = all + (p * GROUP + g) * LEFT;
        const float other = __ldcg(of + DIM), more = fmaxf(highest, other);
        const float keep = exp2f(highest - more), add = exp2f(other - more);
        weight = weight * keep + __ldcg(of + DIM + 1) * add;
        sum = sum * keep + __ldcg(of + d) * add;
        highest = more;
      }
      out[(key_head * GROUP + g) * DIM + d] = static_cast<T>(sum / weight);
    }
    if (threadIdx.x == 0) {
      tickets[key_head] = 0;
    }
  }
};
