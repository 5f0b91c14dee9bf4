#include "kernels.h"

// Compiled once for each instruction set: ISA names it, VL floats make a vector. Sums over k run in one fixed order whatever
// the number of rows, so that a row's result doesn't depend on its neighbours. kernels/reference.py holds the same
// operations in torch.

namespace {

#include "vectors.h"

constexpr int NV = VL == 16 ? 4 : 2;  // vectors across a panel
constexpr int NR = NV * VL;           // columns of a panel
constexpr int MR = 6;                 // rows of a tile: MR * NV sums stay in registers
constexpr int MAX_RANK = 512;

// ---- y = x W + b ----------------------------------------------------------------------------------------------------
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

// R rows of one panel. While it computes it fetches `ahead` lines a step of what comes after, from `next` on.
template <int R, typename T, typename Y>
static void tile(const float* x, int64_t ldx, const T* panel, const float* bias, Y* y, int64_t ldy, int64_t K,
                 int64_t cols, const char* next, int ahead) {
  vec acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = vec{};
  constexpr int step = paired<T> ? 2 : 1;
  for (int64_t k = 0; k < K; k += step) {
    for (int i = 0; i < ahead; i++, next += 64) __builtin_prefetch(next, 0, 2);
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
  static thread_local std::vector<float> wide;
  const float* xf = widened(x, ldx, M, K, wide);
  if (paired<T>) ldx = K;
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
      const float* xr = xf + row * ldx;
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

// ---- attention of one token per sequence over its own cache row -----------------------------------------------------
// qkv [D, 3, H, Dh]; the token's key and value are written into the caches [rows, H, max_len, Dh] at its position first.

template <typename T>
static void attend(const T* qkv, T* keys, T* values, const int64_t* rows, const int64_t* positions, T* out, int64_t D,
                   int64_t H, int64_t Dh, int64_t max_len, float scale) {
#pragma omp parallel
  {
    static thread_local std::vector<float> kept;
    kept.resize(max_len + VL);
    float* scores = kept.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < D * H; i++) {
      int64_t d = i / H, h = i % H, length = positions[d] + 1;
      const T* q = qkv + (d * 3 * H + h) * Dh;
      T* ks = keys + (rows[d] * H + h) * max_len * Dh;
      T* vs = values + (rows[d] * H + h) * max_len * Dh;
      std::memcpy(ks + positions[d] * Dh, q + H * Dh, Dh * sizeof(T));
      std::memcpy(vs + positions[d] * Dh, q + 2 * H * Dh, Dh * sizeof(T));
      float top = -INFINITY;
      for (int64_t t = 0; t < length; t++) {
        vec s{};
        float rest = 0;
        int64_t c = 0;
        for (; c + VL <= Dh; c += VL) s += load(q + c) * load(ks + t * Dh + c);
        for (; c < Dh; c++) rest += to_float(q[c]) * to_float(ks[t * Dh + c]);
        scores[t] = (sum(s) + rest) * scale;
        top = scores[t] > top ? scores[t] : top;
      }
      for (int64_t t = length; t < (length + VL - 1) / VL * VL; t++) scores[t] = -INFINITY;
      vec total{};
      for (int64_t t = 0; t < length; t += VL) {
        vec e = exp_of_nonpositive(load(scores + t) - top);
        store(scores + t, e);
        total += e;
      }
      float inverse = 1.0f / sum(total);
      T* o = out + (d * H + h) * Dh;
      int64_t c = 0;
      for (; c + VL <= Dh; c += VL) {
        vec s{};
        for (int64_t t = 0; t < length; t++) s += scores[t] * load(vs + t * Dh + c);
        store(o + c, s * inverse);
      }
      for (; c < Dh; c++) {
        float s = 0;
        for (int64_t t = 0; t < length; t++) s += scores[t] * to_float(vs[t * Dh + c]);
        put(o[c], s * inverse);
      }
    }
  }
}

// ---- y[n] += (x[n] A_n^T) B_n ---------------------------------------------------------------------------------------
// A_n [r, K], B_n [r, N]; rows with rank 0 stay as they are.

template <typename T>
static void lora(const T* x, int64_t ldx, T* y, int64_t ldy, const T* const* a, const T* const* b, const int64_t* ranks,
                 int64_t M, int64_t K, int64_t N) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < M; n++) {
    if (ranks[n] == 0) continue;
    float xa[MAX_RANK];
    static thread_local std::vector<float> wide;
    const float* row = widened(x + n * ldx, ldx, 1, K, wide);
    for (int64_t j = 0; j < ranks[n]; j++) {
      const T* aj = a[n] + j * K;
      vec s0{}, s1{}, s2{}, s3{};
      int64_t k = 0;
      for (; k + 4 * VL <= K; k += 4 * VL) {
        s0 += load(row + k) * load(aj + k);
        s1 += load(row + k + VL) * load(aj + k + VL);
        s2 += load(row + k + 2 * VL) * load(aj + k + 2 * VL);
        s3 += load(row + k + 3 * VL) * load(aj + k + 3 * VL);
      }
      float rest = 0;
      for (; k < K; k++) rest += row[k] * to_float(aj[k]);
      xa[j] = sum((s0 + s1) + (s2 + s3)) + rest;
    }
    T* out = y + n * ldy;
    int64_t c = 0;
    for (; c + 4 * VL <= N; c += 4 * VL) {
      vec s[4] = {load(out + c), load(out + c + VL), load(out + c + 2 * VL), load(out + c + 3 * VL)};
      for (int64_t j = 0; j < ranks[n]; j++)
        for (int v = 0; v < 4; v++) s[v] += xa[j] * load(b[n] + j * N + c + v * VL);
      for (int v = 0; v < 4; v++) store(out + c + v * VL, s[v]);
    }
    for (; c < N; c++) {
      float s = to_float(out[c]);
      for (int64_t j = 0; j < ranks[n]; j++) s += xa[j] * to_float(b[n][j * N + c]);
      put(out[c], s);
    }
  }
}

#include "sampling.h"

}  // namespace

extern const Kernels KERNELS(ISA);
const Kernels KERNELS(ISA) = {
    STRING(ISA), NR,
    pack<float>, pack<bf16>,
    linear<float, float>, linear<bf16, bf16>, linear<bf16, float>,
    attend<float>, attend<bf16>,
    lora<float>, lora<bf16>,
    choose,
};
