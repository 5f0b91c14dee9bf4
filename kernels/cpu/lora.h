// y[row_n] += w_n (x[row_n] A_n^T) B_n
// Of M lines, in their order, each for a row of x and y: A_n [r, K], B_n [r, N]. A row may have several. Lines of one adapter
// stand together, so that its weights are read from memory once; what is needed next is fetched ahead.

static inline float dot(const float* x, const float* a, int64_t K) {
  vec s0{}, s1{}, s2{}, s3{};
  int64_t k = 0;
  for (; k + 4 * VL <= K; k += 4 * VL) {
    s0 += load(x + k) * load(a + k);
    s1 += load(x + k + VL) * load(a + k + VL);
    s2 += load(x + k + 2 * VL) * load(a + k + 2 * VL);
    s3 += load(x + k + 3 * VL) * load(a + k + 3 * VL);
  }
  float rest = 0;
  for (; k < K; k++) rest += x[k] * a[k];
  return sum((s0 + s1) + (s2 + s3)) + rest;
}
static inline float dot(const bf16* x, const bf16* a, int64_t K) {
  vec s[4] = {};
  int64_t k = 0;
  if (DOT) {
    for (; k + 8 * VL <= K; k += 8 * VL)
      for (int i = 0; i < 4; i++) s[i] = add_products(s[i], pairs(a + k + 2 * i * VL), pairs(x + k + 2 * i * VL));
  }
  for (; k + 4 * VL <= K; k += 4 * VL)
    for (int i = 0; i < 4; i++) s[i] += load(x + k + i * VL) * load(a + k + i * VL);
  float rest = 0;
  for (; k < K; k++) rest += to_float(x[k]) * to_float(a[k]);
  return sum((s[0] + s[1]) + (s[2] + s[3])) + rest;
}

template <typename T>
static void lora(const T* x, int64_t ldx, T* y, int64_t ldy, const int64_t* rows, const T* const* a, const T* const* b,
                 const int64_t* ranks, const double* weights, int64_t M, int64_t K, int64_t N) {
  constexpr int64_t block = 4 * VL, ahead = 8 * block;
  static thread_local std::vector<float> kept;
  kept.resize(M * MAX_RANK);
  float* xa = kept.data();  // [M, MAX_RANK], the calling thread's
  int64_t blocks = (N + block - 1) / block, most = M ? *std::max_element(ranks, ranks + M) : 0;
#pragma omp parallel
  {
    // By row, as the norm before left x in this core's cache; then by column, as the product left y.
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t from = blocks * thread / threads * block, to = std::min(N, blocks * (thread + 1) / threads * block);
    for (int64_t j = 0; M && j < ranks[0]; j++) fetch(b[0] + j * N + from, std::min(ahead, to - from) * sizeof(T));
#pragma omp for schedule(static) collapse(2)
    for (int64_t n = 0; n < M; n++)
      for (int64_t j = 0; j < most; j++)
        if (j < ranks[n]) xa[n * MAX_RANK + j] = (float)weights[n] * dot(x + rows[n] * ldx, a[n] + j * K, K);
    for (int64_t n = 0; n < M; n++) {
      const float* weight = xa + n * MAX_RANK;
      const T* next = n + 1 < M ? b[n + 1] : b[n];
      T* out = y + rows[n] * ldy;
      int64_t c = from;
      for (; c + block <= to; c += block) {
        vec s[4] = {load(out + c), load(out + c + VL), load(out + c + 2 * VL), load(out + c + 3 * VL)};
        // Near the end the next row's B follows.
        const T* coming = c + ahead < to ? b[n] + c + ahead : next + from + (c + ahead - to);
        for (int64_t j = 0; j < ranks[n]; j++) {
          const T* bj = b[n] + j * N + c;
          fetch(coming + j * N, block * sizeof(T));
          for (int v = 0; v < 4; v++) s[v] += weight[j] * load(bj + v * VL);
        }
        for (int v = 0; v < 4; v++) store(out + c + v * VL, s[v]);
      }
      for (; c < to; c++) {
        float s = to_float(out[c]);
        for (int64_t j = 0; j < ranks[n]; j++) s += weight[j] * to_float(b[n][j * N + c]);
        put(out[c], s);
      }
    }
  }
}
