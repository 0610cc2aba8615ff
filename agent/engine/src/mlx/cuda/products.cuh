// Products of the features of one position with a matrix of shape [rows, columns]. Each warp makes one number: its
// lanes take turns along the columns, 16 bytes at a time. No warp waits for another, and what a warp needs of the
// matrix is asked for before anything is computed with it.

// Of a block.
constexpr int THREADS = 128;

// As many values as a lane reads at once.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};

template <typename T>
__device__ Chunk<T> chunk(const T* from, int index) {
  const uint4 bits = reinterpret_cast<const uint4*>(from)[index];
  return *reinterpret_cast<const Chunk<T>*>(&bits);
}

// Asks for a chunk of what is read only once; it comes while other work goes on.
template <typename T>
__device__ void ask_for(Chunk<T>* to, const T* from, int index) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::
                   "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(reinterpret_cast<const uint4*>(from) + index)
               : "memory");
}

// What was asked for since the last time is a group.
__device__ inline void end_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups of this lane but the last `COUNT`.
template <int COUNT>
__device__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

__device__ inline float summed(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x += __shfl_xor_sync(0xffffffff, x, lanes);
  }
  return x;
}

// Groups that a lane has on their way, of one chunk for each of so many rows.
constexpr int COMING = 8;

// Sums over the columns that a lane has seen.
template <typename T, int ROWS, bool NORMED>
struct Sums {
  // `x * norm * row`, or `x * row` where there is no norm, for each row.
  float rows[ROWS] = {};
  // `x * x`, if there is a norm.
  float squares = 0;

  __device__ void add(const T* x, const T* norm, const Chunk<T> (&weights)[ROWS], int index) {
    const Chunk<T> values = chunk(x, index);
    Chunk<T> factors = values;
    if (NORMED) {
      factors = chunk(norm, index);
    }
#pragma unroll
    for (int j = 0; j < Chunk<T>::SIZE; ++j) {
      float value = static_cast<float>(values.at[j]);
      if (NORMED) {
        squares += value * value;
        value *= static_cast<float>(factors.at[j]);
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        rows[row] += value * static_cast<float>(weights[row].at[j]);
      }
    }
  }

  // Over the columns of all lanes, which all have the result. What was asked for comes to places of the lane's own.
  __device__ void take(
      Chunk<T> (&coming)[COMING][THREADS], const T* x, const T* norm,
      const T* const (&matrix)[ROWS], int columns) {
    constexpr int AHEAD = COMING / ROWS;
    const int chunks = columns / Chunk<T>::SIZE, lane = threadIdx.x % 32;
    const auto ask = [&](int turn) {
      const int index = lane + 32 * turn;
      if (index < chunks) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          ask_for(&coming[turn % AHEAD * ROWS + row][threadIdx.x], matrix[row], index);
        }
      }
      end_group();
    };
    for (int turn = 0; turn < AHEAD; ++turn) {
      ask(turn);
    }
    const auto take_in = [&](int turn) {
      Chunk<T> weights[ROWS];
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        weights[row] = coming[turn % AHEAD * ROWS + row][threadIdx.x];
      }
      add(x, norm, weights, lane + 32 * turn);
    };
    const int full = chunks / 32;
#pragma unroll 4
    for (int turn = 0; turn < full; ++turn) {
      wait_for_groups<AHEAD - 1>();
      take_in(turn);
      ask(turn + AHEAD);
    }
    wait_for_groups<0>();
    if (lane + 32 * full < chunks) {
      take_in(full);
    }
    for (int row = 0; row < ROWS; ++row) {
      rows[row] = summed(rows[row]);
    }
    if (NORMED) {
      squares = summed(squares);
    }
  }
};

// What is made of `x` and `weight`; `other` is a norm or what is added.
constexpr int PROJECT = 1, PROJECT_GATED = 2, PROJECT_ONTO = 3;

// All in one kernel, so that it is compiled once. With `row` below `count`, the rows of `weight`:
// PROJECT: `out[row]` = product of the normalized `x` with `weight[row]`.
// PROJECT_GATED, with `count` half as many: `out[row]` = silu(gate) * up, those with `weight[row]` and
// `weight[row + count]`.
// PROJECT_ONTO: `out[row]` = `other[row]` + product of `x` with `weight[row]`.
template <typename T>
__device__ void run_product(
    int kind, const T* x, const T* other, const T* weight, int rows, int columns, float eps, T* out) {
  __shared__ Chunk<T> coming[COMING][THREADS];
  const int row = (blockIdx.x * THREADS + threadIdx.x) / 32;
  const int count = kind == PROJECT_GATED ? rows / 2 : rows;
  if (row >= count) {
    return;
  }
  const bool writes = threadIdx.x % 32 == 0;
  const T* const first = weight + static_cast<size_t>(row) * columns;
  if (kind == PROJECT_GATED) {
    const T* const both[2] = {first, first + static_cast<size_t>(count) * columns};
    Sums<T, 2, true> sums;
    sums.take(coming, x, other, both, columns);
    const float scale = rsqrtf(sums.squares / columns + eps);
    // As they would be between two operations.
    const float gate = static_cast<float>(static_cast<T>(sums.rows[0] * scale));
    const float up = static_cast<float>(static_cast<T>(sums.rows[1] * scale));
    if (writes) {
      out[row] = static_cast<T>(gate / (1 + expf(-gate)) * up);
    }
  } else if (kind == PROJECT) {
    const T* const one[1] = {first};
    Sums<T, 1, true> sums;
    sums.take(coming, x, other, one, columns);
    if (writes) {
      out[row] = static_cast<T>(sums.rows[0] * rsqrtf(sums.squares / columns + eps));
    }
  } else if (kind == PROJECT_ONTO) {
    const T* const one[1] = {first};
    Sums<T, 1, false> sums;
    sums.take(coming, x, x, one, columns);
    if (writes) {
      const float product = static_cast<float>(static_cast<T>(sums.rows[0]));
      out[row] = static_cast<T>(static_cast<float>(other[row]) + product);
    }
  }
}
