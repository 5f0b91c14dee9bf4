// y = x W + b
// Packed W: panels of NR columns, each [K][NR]; in bf16 [K/2][NR][2], K even, so that one load holds a vector of two k.

template <typename T>
constexpr bool paired = sizeof(T) == 2;
constexpr int64_t SMALL_BLOCK = 16 << 10, LARGE_BLOCK = 256 << 10;  // bytes

template <typename T>
static void pack(const T* w, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, T* out) {
  int64_t panels = (N + NR - 1) / NR;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; p++)
    for (int64_t k = 0; k < K; k++)
      for (int64_t j = 0; j < NR; j++) {
        int64_t n = p * NR + j;
        int64_t at = paired<T> ? (k / 2 * NR + j) * 2 + k % 2 : k * NR + j;
        out[p * K * NR + at] = n < N ? w[k * stride_k + n * stride_n] : T{};
      }
}

// x as the products take it: bf16 where the processor multiplies pairs of it, elsewhere widened to fp32.
template <typename T>
using Operand = std::conditional_t<DOT && paired<T>, bf16, float>;

// acc [R, NR] += x [R, K] w [K, NR], or = if `first`. While it computes it fetches `ahead` lines a step from `next` on.
template <int R, typename T>
static void tile(const Operand<T>* x, int64_t ldx, const T* w, int64_t K, float* acc, bool first, const char* next,
                 int ahead) {
  vec s[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) s[r][v] = first ? vec{} : load(acc + r * NR + v * VL);
  constexpr int step = paired<T> ? 2 : 1;
  for (int64_t k = 0; k < K; k += step) {
    for (int i = 0; i < ahead; i++, next += 64) __builtin_prefetch(next, 0, 2);
    if constexpr (DOT && paired<T>) {
      ivec two[NV];
      for (int v = 0; v < NV; v++) two[v] = pairs(w + k * NR + v * 2 * VL);
      for (int r = 0; r < R; r++) {
        ivec both = ivec{} + *(const unaligned_int*)(x + r * ldx + k);
        for (int v = 0; v < NV; v++) s[r][v] = add_products(s[r][v], two[v], both);
      }
    } else {
      vec one[step][NV];
      for (int v = 0; v < NV; v++) {
        if constexpr (paired<T>) {
          ivec two = pairs(w + k * NR + v * 2 * VL);
          one[0][v] = (vec)(two << 16);
          one[1][v] = (vec)(two & -65536);
        } else {
          one[0][v] = load(w + k * NR + v * VL);
        }
      }
      for (int i = 0; i < step; i++)
        for (int r = 0; r < R; r++)
          for (int v = 0; v < NV; v++) s[r][v] += x[r * ldx + k + i] * one[i][v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) store(acc + r * NR + v * VL, s[r][v]);
}

// y [rows, cols] = acc [rows, NR] + bias
template <typename Y>
static void finish(const float* acc, const float* bias, Y* y, int64_t ldy, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r++, acc += NR, y += ldy) {
    if (cols == NR) {
      for (int v = 0; v < NV; v++) {
        vec s = load(acc + v * VL);
        store(y + v * VL, bias ? s + load(bias + v * VL) : s);
      }
    } else {
      for (int64_t j = 0; j < cols; j++) put(y[j], acc[j] + (bias ? bias[j] : 0.0f));
    }
  }
}

static const float* widened(const float* x, int64_t, int64_t, int64_t, std::vector<float>&) { return x; }
static const float* widened(const bf16* x, int64_t ldx, int64_t M, int64_t K, std::vector<float>& wide) {
  wide.resize(M * K);
  for (int64_t m = 0; m < M; m++) {
    int64_t k = 0;
    for (; k + VL <= K; k += VL) store(wide.data() + m * K + k, load(x + m * ldx + k));
    for (; k < K; k++) wide[m * K + k] = to_float(x[m * ldx + k]);
  }
  return wide.data();
}

// x [M, K], packed W of N columns, bias [N] or null, y [M, N]. A panel is read in blocks: small ones where few rows make
// memory the limit, so that a block comes from memory once and is still in the first cache for the next tile; else as
// much as the second cache holds, to keep sums in registers for longer. The next block is fetched meanwhile.
template <typename T, typename Y>
static void linear(const T* x, int64_t ldx, const T* packed, const float* bias, Y* y, int64_t ldy, int64_t M, int64_t K,
                   int64_t N) {
  const Operand<T>* operand;
  if constexpr (DOT && paired<T>) {
    operand = x;
  } else {
    static thread_local std::vector<float> wide;
    operand = widened(x, ldx, M, K, wide);
    if (paired<T>) ldx = K;
  }
  constexpr int64_t group = 8 * MR, row_bytes = NR * (int64_t)sizeof(T);
  int64_t panels = (N + NR - 1) / NR;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; p++) {
    alignas(64) float acc[group * NR];
    const T* panel = packed + p * K * NR;
    for (int64_t from = 0; from < M; from += group) {
      int64_t count = std::min(group, M - from), tiles = (count + MR - 1) / MR;
      int64_t block = std::min(K, (tiles <= 3 ? SMALL_BLOCK : LARGE_BLOCK) / row_bytes);
      int64_t lines = block * row_bytes / 64, steps = tiles * block / (paired<T> ? 2 : 1);
      int ahead = (int)((lines + steps - 1) / steps);
      for (int64_t k = 0; k < K; k += block) {
        const T* w = panel + k * NR;
        int64_t depth = std::min(block, K - k);
        for (int64_t t = 0, row = 0; t < tiles; t++) {
          int64_t rows = (count - row + tiles - t - 1) / (tiles - t);  // tiles of like height
          const Operand<T>* xr = operand + (from + row) * ldx + k;
          const char* next = (const char*)(w + block * NR) + t * (lines / tiles) * 64;
          float* a = acc + row * NR;
          switch (rows) {
            case 1: tile<1>(xr, ldx, w, depth, a, k == 0, next, ahead); break;
            case 2: tile<2>(xr, ldx, w, depth, a, k == 0, next, ahead); break;
            case 3: tile<3>(xr, ldx, w, depth, a, k == 0, next, ahead); break;
            case 4: tile<4>(xr, ldx, w, depth, a, k == 0, next, ahead); break;
            case 5: tile<5>(xr, ldx, w, depth, a, k == 0, next, ahead); break;
            default: tile<6>(xr, ldx, w, depth, a, k == 0, next, ahead);
          }
          row += rows;
        }
      }
      const float* b = bias ? bias + p * NR : nullptr;
      finish(acc, b, y + from * ldy + p * NR, ldy, count, std::min<int64_t>(NR, N - p * NR));
    }
  }
}
