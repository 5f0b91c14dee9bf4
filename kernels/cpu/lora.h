// y[n] += (x[n] A_n^T) B_n
// A_n [r, K], B_n [r, N]; rows with rank 0 stay as they are. The weights come from memory, each row's own: what is needed
// next is fetched ahead.

template <typename T>
static void lora(const T* x, int64_t ldx, T* y, int64_t ldy, const T* const* a, const T* const* b, const int64_t* ranks,
                 int64_t M, int64_t K, int64_t N) {
  constexpr int64_t block = 4 * VL, ahead = 8 * block;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < M; n++) {
    if (ranks[n] == 0) continue;
    float xa[MAX_RANK];
    static thread_local std::vector<float> wide;
    const float* row = widened(x + n * ldx, ldx, 1, K, wide);
    for (int64_t j = 0; j < ranks[n]; j++) {
      const T* aj = a[n] + j * K;
      fetch(b[n] + j * N, (N < ahead ? N : ahead) * sizeof(T));
      vec s0{}, s1{}, s2{}, s3{};
      int64_t k = 0;
      for (; k + block <= K; k += block) {
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
    const T* next = n + 1 < M ? a[n + 1] : nullptr;
    int64_t share = next ? (ranks[n + 1] * K + N - 1) / N * block : 0;  // of the next A, for each block of columns
    int64_t c = 0;
    for (; c + block <= N; c += block, next += share) {
      fetch(next, share * sizeof(T));
      vec s[4] = {load(out + c), load(out + c + VL), load(out + c + 2 * VL), load(out + c + 3 * VL)};
      for (int64_t j = 0; j < ranks[n]; j++) {
        const T* bj = b[n] + j * N + c;
        fetch(bj + ahead, block * sizeof(T));
        for (int v = 0; v < 4; v++) s[v] += xa[j] * load(bj + v * VL);
      }
      for (int v = 0; v < 4; v++) store(out + c + v * VL, s[v]);
    }
    for (; c < N; c++) {
      float s = to_float(out[c]);
      for (int64_t j = 0; j < ranks[n]; j++) s += xa[j] * to_float(b[n][j * N + c]);
      put(out[c], s);
    }
  }
}
