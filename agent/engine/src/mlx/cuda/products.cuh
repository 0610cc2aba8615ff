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

// Sums over the columns that a lane has seen.
template <int ROWS, bool NORMED>
struct Sums {
  // `x * norm * row`, or `x * row` where there is no norm, for each row.
  float rows[ROWS] = {};
  // `x * x`, if there is a norm.
  float squares = 0;

  template <typename T>
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

  // Over the columns of all lanes, which all have the result. Each lane has `AHEAD` groups of chunks on their way to
  // places of its own.
  template <int COLUMNS, typename T>
  __device__ void take(const T* x, const T* norm, const T* const (&matrix)[ROWS]) {
    constexpr int CHUNKS = COLUMNS / Chunk<T>::SIZE;
    constexpr int AHEAD = 8 / ROWS;
    static_assert(COLUMNS % Chunk<T>::SIZE == 0, "rows begin at 16 bytes");
    __shared__ Chunk<T> coming[AHEAD][ROWS][THREADS];
    const int lane = threadIdx.x % 32;
    const auto ask = [&](int turn) {
      const int index = lane + 32 * turn;
      if (index < CHUNKS) {
        for (int row = 0; row < ROWS; ++row) {
          ask_for(&coming[turn % AHEAD][row][threadIdx.x], matrix[row], index);
        }
      }
      end_group();
    };
    for (int turn = 0; turn < AHEAD; ++turn) {
      ask(turn);
    }
#pragma unroll 4
    for (int turn = 0; turn < (CHUNKS + 31) / 32; ++turn) {
      const int index = lane + 32 * turn;
      wait_for_groups<AHEAD - 1>();
      if (index < CHUNKS) {
        Chunk<T> weights[ROWS];
        for (int row = 0; row < ROWS; ++row) {
          weights[row] = coming[turn % AHEAD][row][threadIdx.x];
        }
        add(x, norm, weights, index);
      }
      ask(turn + AHEAD);
    }
    for (int row = 0; row < ROWS; ++row) {
      rows[row] = summed(rows[row]);
    }
    if (NORMED) {
      squares = summed(squares);
    }
  }
};

__device__ inline int warp_of_grid() {
  return (blockIdx.x * blockDim.x + threadIdx.x) / 32;
}

// `out[row]` = product of the normalized `x` with `weight[row]`.
template <int ROWS, int COLUMNS, typename T>
__device__ void project(const T* x, const T* norm, const T* weight, float eps, T* out) {
  const int row = warp_of_grid();
  if (row >= ROWS) {
    return;
  }
  const T* const rows[1] = {weight + static_cast<size_t>(row) * COLUMNS};
  Sums<1, true> sums;
  sums.template take<COLUMNS>(x, norm, rows);
  if (threadIdx.x % 32 == 0) {
    out[row] = static_cast<T>(sums.rows[0] * rsqrtf(sums.squares / COLUMNS + eps));
  }
}

// `out[row]` = silu(gate) * up, the products of the normalized `x` with `weight[row]` and `weight[row + ROWS]`.
template <int ROWS, int COLUMNS, typename T>
__device__ void project_gated(const T* x, const T* norm, const T* weight, float eps, T* out) {
  const int row = warp_of_grid();
  if (row >= ROWS) {
    return;
  }
  const T* const rows[2] = {
      weight + static_cast<size_t>(row) * COLUMNS,
      weight + (static_cast<size_t>(row) + ROWS) * COLUMNS};
  Sums<2, true> sums;
  sums.template take<COLUMNS>(x, norm, rows);
  if (threadIdx.x % 32 == 0) {
    const float scale = rsqrtf(sums.squares / COLUMNS + eps);
    // As they would be between two operations.
    const float gate = static_cast<float>(static_cast<T>(sums.rows[0] * scale));
    const float up = static_cast<float>(static_cast<T>(sums.rows[1] * scale));
    out[row] = static_cast<T>(gate / (1 + expf(-gate)) * up);
  }
}

// `out[row]` = `residual[row]` + product of `x` with `weight[row]`.
template <int ROWS, int COLUMNS, typename T>
__device__ void project_onto(const T* x, const T* weight, const T* residual, T* out) {
  const int row = warp_of_grid();
  if (row >= ROWS) {
    return;
  }
  const T* const rows[1] = {weight + static_cast<size_t>(row) * COLUMNS};
  Sums<1, false> sums;
  sums.template take<COLUMNS>(x, x, rows);
  if (threadIdx.x % 32 == 0) {
    const float product = static_cast<float>(static_cast<T>(sums.rows[0]));
    out[row] = static_cast<T>(static_cast<float>(residual[row]) + product);
  }
}
