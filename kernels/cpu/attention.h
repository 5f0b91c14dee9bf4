// attention of one token per sequence over its own cache row
// qkv [D, 3, H, Dh]; the token's key and value are written into the caches [rows, H, max_len, Dh] at its position first.

// NC vectors of sum_t w[t] v[t], scaled. v: [length] rows, ld apart; fetches as many rows of what comes `next`.
template <int NC, typename T>
static void weighted(const float* w, int64_t length, const T* v, int64_t ld, float scale, T* out, const T* next) {
  vec s[2][NC] = {};
  int64_t t = 0;
  for (; t + 2 <= length; t += 2) {
    fetch(next + t * ld, 2 * ld * sizeof(T));
    for (int i = 0; i < 2; i++)
      for (int c = 0; c < NC; c++) s[i][c] += w[t + i] * load(v + (t + i) * ld + c * VL);
  }
  for (; t < length; t++)
    for (int c = 0; c < NC; c++) s[0][c] += w[t] * load(v + t * ld + c * VL);
  for (int c = 0; c < NC; c++) store(out + c * VL, (s[0][c] + s[1][c]) * scale);
}

template <typename T>
static void attend(const T* qkv, T* keys, T* values, const int64_t* rows, const int64_t* positions, T* out, int64_t D,
                   int64_t H, int64_t Dh, int64_t max_len, float scale) {
  int64_t whole = Dh / VL * VL;
#pragma omp parallel
  {
    static thread_local std::vector<float> kept;
    kept.resize(max_len + VL + Dh);
    float *scores = kept.data(), *wide = scores + max_len + VL;
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < D * H; i++) {
      int64_t d = i / H, h = i % H, length = positions[d] + 1;
      const T* q = qkv + (d * 3 * H + h) * Dh;
      T* ks = keys + (rows[d] * H + h) * max_len * Dh;
      T* vs = values + (rows[d] * H + h) * max_len * Dh;
      std::memcpy(ks + positions[d] * Dh, q + H * Dh, Dh * sizeof(T));
      std::memcpy(vs + positions[d] * Dh, q + 2 * H * Dh, Dh * sizeof(T));
      for (int64_t c = 0; c < Dh; c++) wide[c] = to_float(q[c]) * scale;
      float top = -INFINITY;
      for (int64_t t = 0; t < length; t++) {
        const T* key = ks + t * Dh;
        fetch(vs + t * Dh, Dh * sizeof(T));
        vec s{};
        float rest = 0;
        for (int64_t c = 0; c < whole; c += VL) s += load(wide + c) * load(key + c);
        for (int64_t c = whole; c < Dh; c++) rest += wide[c] * to_float(key[c]);
        scores[t] = sum(s) + rest;
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
      const T* next = ks + max_len * Dh;  // the next head's keys
      for (; c + 4 * VL <= Dh; c += 4 * VL) weighted<4>(scores, length, vs + c, Dh, inverse, o + c, next);
      for (; c + VL <= Dh; c += VL) weighted<1>(scores, length, vs + c, Dh, inverse, o + c, next);
      for (; c < Dh; c++) {
        float s = 0;
        for (int64_t t = 0; t < length; t++) s += scores[t] * to_float(vs[t * Dh + c]);
        put(o[c], s * inverse);
      }
    }
  }
}
