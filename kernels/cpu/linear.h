// y = x W + b
// Packed W: panels of NR columns, each [K][NR]; in bf16 [K/2][NR][2], K even, so that one load holds a vector of two k.

template <typename T>
constexpr bool paired = sizeof(T) == 2;

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

// R rows of one panel. While it computes it fetches `ahead` lines a step of what comes after, from `next` on.
template <int R, typename T, typename Y>
static void tile(const Operand<T>* x, int64_t ldx, const T* panel, const float* bias, Y* y, int64_t ldy, int64_t K,
                 int64_t cols, const char* next, int ahead) {
  vec acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = vec{};
  constexpr int step = paired<T> ? 2 : 1;
  for (int64_t k = 0; k < K; k += step) {
    for (int i = 0; i < ahead; i++, next += 64) __builtin_prefetch(next, 0, 2);
    if constexpr (DOT && paired<T>) {
      ivec w[NV];
      for (int v = 0; v < NV; v++) w[v] = *(const ivec*)(panel + k * NR + v * 2 * VL);
      for (int r = 0; r < R; r++) {
        int32_t two = *(const unaligned_int*)(x + r * ldx + k);
        for (int v = 0; v < NV; v++) acc[r][v] = add_products(acc[r][v], w[v], ivec{} + two);
      }
    } else {
      vec w[step][NV];
      for (int v = 0; v < NV; v++) {
        if constexpr (paired<T>) {
          ivec two = *(const ivec*)(panel + k * NR + v * 2 * VL);
          w[0][v] = (vec)(two << 16);
          w[1][v] = (vec)(two & -65536);
        } else {
          w[0][v] = load(panel + k * NR + v * VL);
        }
      }
      for (int i = 0; i < step; i++)
        for (int r = 0; r < R; r++)
          for (int v = 0; v < NV; v++) acc[r][v] += x[r * ldx + k + i] * w[i][v];
    }
  }
  for (int r = 0; r < R; r++) {
    Y* row = y + r * ldy;
    if (cols == NR) {
      for (int v = 0; v < NV; v++) store(row + v * VL, bias ? acc[r][v] + load(bias + v * VL) : acc[r][v]);
    } else {
      float full[NR];
      for (int v = 0; v < NV; v++) store(full + v * VL, acc[r][v]);
      for (int64_t j = 0; j < cols; j++) put(row[j], full[j] + (bias ? bias[j] : 0.0f));
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

// x [M, K], packed W of N columns, bias [N] or null, y [M, N]
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
  int64_t panels = (N + NR - 1) / NR, tiles = (M + MR - 1) / MR, bytes = K * NR * (int64_t)sizeof(T);
  int64_t steps = tiles * (paired<T> ? K / 2 : K);
  // The first tile of a panel reads it from memory; the others fetch the next panel meanwhile.
  int ahead = tiles > 1 ? (int)((bytes / 64 + steps - 1) / steps) : 0;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; p++) {
    const T* panel = packed + p * K * NR;
    const char* next = (const char*)(panel + K * NR);
    const float* b = bias ? bias + p * NR : nullptr;
    int64_t cols = N - p * NR < NR ? N - p * NR : NR;
    for (int64_t t = 0, row = 0; t < tiles; t++) {
      int64_t rows = (M - row + tiles - t - 1) / (tiles - t);  // tiles of like height
      const Operand<T>* xr = operand + row * ldx;
      Y* yr = y + row * ldy + p * NR;
      const char* part = next + t * (bytes / tiles);
      switch (rows) {
        case 1: tile<1>(xr, ldx, panel, b, yr, ldy, K, cols, part, ahead); break;
        case 2: tile<2>(xr, ldx, panel, b, yr, ldy, K, cols, part, ahead); break;
        case 3: tile<3>(xr, ldx, panel, b, yr, ldy, K, cols, part, ahead); break;
        case 4: tile<4>(xr, ldx, panel, b, yr, ldy, K, cols, part, ahead); break;
        case 5: tile<5>(xr, ldx, panel, b, yr, ldy, K, cols, part, ahead); break;
        default: tile<6>(xr, ldx, panel, b, yr, ldy, K, cols, part, ahead);
      }
      row += rows;
    }
  }
}
