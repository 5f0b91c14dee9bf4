// x += delta, and its layer norm
// x [M, d] in place, delta [M, d] or null, w, b [d] fp32, out [M, d]; sums in fp32, twice over the row as torch does.

template <typename T>
static void norm(T* x, const T* delta, const float* w, const float* b, float eps, T* out, int64_t M, int64_t d) {
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; m++) {
    static thread_local std::vector<float> kept;
    kept.resize(d + VL);
    float* row = kept.data();
    T* xm = x + m * d;
    const T* dm = delta ? delta + m * d : nullptr;
    vec total{};
    float rest = 0;
    int64_t k = 0;
    for (; k + VL <= d; k += VL) {
      if (dm) store(xm + k, load(xm + k) + load(dm + k));
      vec v = load(xm + k);
      store(row + k, v);
      total += v;
    }
    for (; k < d; k++) {
      if (dm) put(xm[k], to_float(xm[k]) + to_float(dm[k]));
      rest += row[k] = to_float(xm[k]);
    }
    float mean = (sum(total) + rest) / d;
    total = vec{};
    rest = 0;
    for (k = 0; k + VL <= d; k += VL) total += (load(row + k) - mean) * (load(row + k) - mean);
    for (; k < d; k++) rest += (row[k] - mean) * (row[k] - mean);
    float scale = 1.0f / std::sqrt((sum(total) + rest) / d + eps);
    for (k = 0; k + VL <= d; k += VL) store(out + m * d + k, (load(row + k) - mean) * scale * load(w + k) + load(b + k));
    for (; k < d; k++) put(out[m * d + k], (row[k] - mean) * scale * w[k] + b[k]);
  }
}

// gelu with the tanh approximation, in place
// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2.

template <typename T>
static void gelu(T* x, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i += VL) {
    float part[VL] = {};
    int64_t count = n - i < VL ? n - i : VL;
    for (int64_t j = count; count < VL && j-- > 0;) part[j] = to_float(x[i + j]);
    vec v = count < VL ? load(part) : load(x + i);
    vec u = v * (v * v * 0.0713548162726f + 1.59576912161f);  // 2 u
    vec e = exp_of_nonpositive(u > 0 ? -u : u);
    vec y = v * (u > 0 ? vec{} + 1.0f : e) / (1.0f + e);
    y = v == v ? y : v;
    if (count < VL) {
      store(part, y);
      for (int64_t j = 0; j < count; j++) put(x[i + j], part[j]);
    } else {
      store(x + i, y);
    }
  }
}
