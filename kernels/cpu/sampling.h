// The next token of each row. Included inside the namespace of one instruction set.
//
// Temperature, top-k, top-p and one uniform number a row, over w = exp((scores - max) / temperature). What top-k and top-p
// leave is found by a histogram over the bits of w, which order as w does; only the bucket where a limit falls is sorted.

constexpr int BUCKETS = 4096;
static inline int bucket_of(float w) {
  int32_t bits;
  std::memcpy(&bits, &w, 4);
  return bits >> 19;  // 8 bits of exponent, 4 of mantissa; w is 0 or more
}

struct Weighed {
  float w;
  int64_t id;
};

struct Scratch {
  std::vector<float> w;
  std::vector<Weighed> bucket;
  double mass[BUCKETS];
  int64_t count[BUCKETS];

  // Keeps the tokens of largest w, in order of w and then id, up to `most` of them and until they hold `enough`; zeroes
  // the others. The first is always kept.
  void keep(int64_t V, int64_t most, double enough) {
    std::memset(mass, 0, sizeof mass);
    std::memset(count, 0, sizeof count);
    for (int64_t i = 0; i < V; i++) {
      int b = bucket_of(w[i]);
      mass[b] += w[i];
      count[b]++;
    }
    int b = BUCKETS - 1;
    double held = 0;
    for (; b > 0 && most > count[b] && held + mass[b] < enough; b--) {
      most -= count[b];
      held += mass[b];
    }
    bucket.clear();
    for (int64_t i = 0; i < V; i++) {
      int of = bucket_of(w[i]);
      if (of == b) bucket.push_back({w[i], i});
      if (of <= b) w[i] = 0;
    }
    std::sort(bucket.begin(), bucket.end(),
              [](const Weighed& x, const Weighed& y) { return x.w > y.w || (x.w == y.w && x.id < y.id); });
    // What equals the last that top-k lets in is let in too, as transformers does; top-p cuts between equals.
    for (size_t i = 0; i < bucket.size() && held < enough; i++, most--) {
      if (most <= 0 && bucket[i].w < bucket[i - 1].w) break;
      w[bucket[i].id] = bucket[i].w;
      held += bucket[i].w;
    }
  }
};

static vec largest(const float* x, int64_t V) {
  vec top = vec{} - INFINITY;
  int64_t i = 0;
  for (; i + VL <= V; i += VL) {
    vec v = load(x + i);
    top = v > top ? v : top;
  }
  for (; i < V; i++) top[0] = x[i] > top[0] ? x[i] : top[0];
  for (int j = 1; j < VL; j++) top[0] = top[j] > top[0] ? top[j] : top[0];
  return vec{} + top[0];
}

// Sum over the vocabulary in double, a block of vectors at a time. w is padded with zeros to a whole vector.
static double total(const float* w, int64_t V) {
  double all = 0;
  for (int64_t i = 0; i < V; i += 16 * VL) {
    vec s{};
    for (int64_t j = i; j < V && j < i + 16 * VL; j += VL) s += load(w + j);
    all += sum(s);
  }
  return all;
}

// w = exp((x - max) / temperature), padded with zeros; its sum.
static double weigh(const float* x, int64_t V, float temperature, float* w) {
  vec top = largest(x, V);
  for (int64_t i = 0; i < V; i += VL) {
    vec v = vec{} - INFINITY;
    if (i + VL <= V) v = load(x + i);
    else for (int64_t j = i; j < V; j++) v[j - i] = x[j];
    vec e = exp_of_nonpositive((v - top) / temperature);
    store(w + i, e == e ? e : vec{});  // what isn't a number is never drawn
  }
  return total(w, V);
}

// The first token at which the running sum of w passes `target`, or the last that has any weight: rounding may carry the
// target past the end.
static int64_t draw(const float* w, int64_t V, double target) {
  double before = 0;
  int64_t i = 0, last = 0;
  for (double next; i + 64 <= V && before + (next = total(w + i, 64)) <= target; i += 64) before += next;
  for (; i < V; i++) {
    before += w[i];
    if (before > target) return i;
  }
  for (i = 0; i < V; i++)
    if (w[i] > 0) last = i;
  return last;
}

// raw, scores [S, V] (scores: penalised); per row: temperature (0: greedy), top_k (V: off), top_p (>= 1: off), a uniform
// number. Writes tokens [S] and, where wanted, log-softmax of the raw row at the token.
static void choose(const float* raw, const float* scores, int64_t S, int64_t V, const float* temperature,
                   const int64_t* top_k, const float* top_p, const double* uniform, const int64_t* wanted,
                   int64_t* tokens, double* logprobs) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t r = 0; r < S; r++) {
    static thread_local Scratch scratch;
    scratch.w.resize(V + VL);
    float* w = scratch.w.data();
    const float* x = scores + r * V;
    int64_t token = 0;
    if (temperature[r] == 0) {
      float top = largest(x, V)[0];
      while (token < V - 1 && x[token] != top) token++;
    } else {
      double all = weigh(x, V, temperature[r], w);
      if (top_k[r] < V) {
        scratch.keep(V, top_k[r], INFINITY);
        all = total(w, V);
      }
      if (top_p[r] < 1) {
        scratch.keep(V, V, top_p[r] * all);
        all = total(w, V);
      }
      token = draw(w, V, uniform[r] * all);
    }
    tokens[r] = token;
    if (wanted[r]) {
      const float* y = raw + r * V;
      double all = weigh(y, V, 1.0f, w);
      logprobs[r] = (double)y[token] - largest(y, V)[0] - std::log(all);
    } else {
      logprobs[r] = 0;
    }
  }
}
