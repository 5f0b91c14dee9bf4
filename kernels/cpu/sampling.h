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
  std::vector<float> w, scores, far;
  std::vector<int32_t> ids;  // of the tokens that are heavy enough to be looked at
  std::vector<Weighed> bucket;
  std::vector<float> maxima;
  double mass[2][BUCKETS];  // two of each: neighbours often fall into the same bucket and would wait for each other
  int32_t count[2][BUCKETS];

  // Keeps the tokens of largest w, in order of w and then id, up to `most` of them and until they hold `enough` of `all`;
  // zeroes the others. The first is always kept.
  void keep(int64_t V, int64_t most, double enough, double all) {
    float light = most < V ? lower_bound(V, most) : (float)((all - enough) / V * 0.999);
    ids.resize(V + 1);
    int64_t n = 0;
    for (int64_t i = 0; i < V; i++) {
      ids[n] = (int32_t)i;
      n += w[i] >= light;
    }
    std::memset(mass, 0, sizeof mass);
    std::memset(count, 0, sizeof count);
    for (int64_t i = 0; i < n; i++) {
      int b = bucket_of(w[ids[i]]);
      mass[i % 2][b] += w[ids[i]];
      count[i % 2][b]++;
    }
    int b = BUCKETS - 1;
    double held = 0;
    for (; b > 0; b--) {
      int64_t tokens = count[0][b] + count[1][b];
      double holds = mass[0][b] + mass[1][b];
      if (most <= tokens || held + holds >= enough) break;
      most -= tokens;
      held += holds;
    }
    bucket.clear();
    for (int64_t i = 0; i < n; i++)
      if (bucket_of(w[ids[i]]) == b) bucket.push_back({w[ids[i]], ids[i]});
    std::sort(bucket.begin(), bucket.end(),
              [](const Weighed& x, const Weighed& y) { return x.w > y.w || (x.w == y.w && x.id < y.id); });
    int32_t first_bits = (b + 1) << 19;  // the smallest w of the next bucket
    float above;
    std::memcpy(&above, &first_bits, 4);
    for (int64_t i = 0; i < V; i += VL) {
      vec v = load(w.data() + i);
      store(w.data() + i, v >= above ? v : vec{});
    }
    // What equals the last that top-k lets in is let in too, as transformers does; top-p cuts between equals.
    for (size_t i = 0; i < bucket.size() && held < enough; i++, most--) {
      if (most <= 0 && bucket[i].w < bucket[i - 1].w) break;
      w[bucket[i].id] = bucket[i].w;
      held += bucket[i].w;
    }
  }

  // Keeps the tokens whose surprise lies nearest to the expected one until they hold `enough` of `all`, with all that lie
  // as near as the last; zeroes the others (Meister et al. 2022). Surprises differ as the scores x do.
  void keep_typical(const float* x, int64_t V, double enough, double all) {
    double mean = 0;
    for (int64_t i = 0; i < V; i++) mean += w[i] > 0 ? w[i] * (double)x[i] : 0;
    mean /= all;
    far.resize(V);
    std::memset(mass, 0, sizeof mass);
    for (int64_t i = 0; i < V; i++) {
      far[i] = (float)std::abs(x[i] - mean);
      if (w[i] > 0) mass[i % 2][bucket_of(far[i])] += w[i];
    }
    int b = 0;
    double held = 0, holds;
    for (; b < BUCKETS - 1 && held + (holds = mass[0][b] + mass[1][b]) < enough; b++) held += holds;
    bucket.clear();
    for (int64_t i = 0; i < V; i++)
      if (w[i] > 0 && bucket_of(far[i]) == b) bucket.push_back({far[i], i});
    std::sort(bucket.begin(), bucket.end(),
              [](const Weighed& x, const Weighed& y) { return x.w < y.w || (x.w == y.w && x.id < y.id); });
    float limit = bucket.empty() ? INFINITY : bucket.back().w;  // rounding may keep all of them below `enough`
    for (const Weighed& each : bucket) {
      if ((held += w[each.id]) < enough) continue;
      limit = each.w;
      break;
    }
    for (int64_t i = 0; i < V; i++)
      if (far[i] > limit) w[i] = 0;
  }

  // At least `most` tokens weigh as much as this: the most-th largest of the maxima of blocks, 0 if there are fewer blocks.
  float lower_bound(int64_t V, int64_t most) {
    maxima.clear();
    for (int64_t i = 0; i + 2 * VL <= V; i += 2 * VL) {
      vec x = load(w.data() + i), y = load(w.data() + i + VL);
      vec top = x > y ? x : y;
      float m = top[0];
      for (int j = 1; j < VL; j++) m = top[j] > m ? top[j] : m;
      maxima.push_back(m);
    }
    if (most > (int64_t)maxima.size()) return 0;
    std::nth_element(maxima.begin(), maxima.begin() + most - 1, maxima.end(), std::greater<float>());
    return maxima[most - 1];
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

// Whether a softmax of the row means anything: no NaN, no infinity as the largest. -inf leaves a token out.
static bool sane(const float* x, int64_t V) {
  ivec odd{};
  int64_t i = 0;
  bool rest = false;
  for (; i + VL <= V; i += VL) {
    vec v = load(x + i);
    odd |= v != v;
  }
  for (; i < V; i++) rest |= x[i] != x[i];
  for (int j = 0; j < VL; j++) rest |= odd[j] != 0;
  return !rest && std::isfinite(largest(x, V)[0]);
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

// Log-softmax of a score, of the row's largest and the log of the sum of exp(score - largest).
static inline double log_softmax(float x, float top, double log_sum) { return (double)x - top - log_sum; }

// What the scores are changed by before a token is chosen, for row r at from[r] .. from[r + 1].
struct Changes {
  const int64_t *seen, *seen_from;  // where there are edits each once; positive scores are divided, others multiplied
  const float* penalty;             // [S]
  const int64_t *ids, *ids_from;    // each once; null: none
  const float *added, *taken;       // before the penalty, after it

  bool edits(int64_t r) const { return ids_from != nullptr && ids_from[r] < ids_from[r + 1]; }

  const float* apply(const float* row, int64_t r, int64_t V, std::vector<float>& scores) const {
    if (seen_from[r] == seen_from[r + 1] && !edits(r)) return row;
    scores.assign(row, row + V);
    if (edits(r))
      for (int64_t i = ids_from[r]; i < ids_from[r + 1]; i++) scores[ids[i]] += added[i];
    const float* before = edits(r) ? scores.data() : row;
    for (int64_t i = seen_from[r]; i < seen_from[r + 1]; i++) {
      float score = before[seen[i]];
      scores[seen[i]] = score < 0 ? score * penalty[r] : score / penalty[r];
    }
    if (edits(r))
      for (int64_t i = ids_from[r]; i < ids_from[r + 1]; i++) scores[ids[i]] -= taken[i];
    return scores.data();
  }
};

// raw [S, V]; per row: changes, temperature (0: greedy), top_k (V: off), top_p (>= 1: off), typical_p (>= 1: off; null: off
// for all), a uniform number. Writes tokens [S], -1 for a raw row that isn't sane, -2 for one that isn't after its edits,
// and, where wanted, log-softmax of the raw row at the token.
static void choose(const float* raw, int64_t S, int64_t V, const float* penalty, const int64_t* seen,
                   const int64_t* seen_from, const float* temperature, const int64_t* top_k, const float* top_p,
                   const float* typical_p, const int64_t* ids, const int64_t* ids_from, const float* added,
                   const float* taken, const double* uniform, const int64_t* wanted, int64_t* tokens, double* logprobs) {
  const Changes changes = {seen, seen_from, penalty, ids, ids_from, added, taken};
#pragma omp parallel for schedule(dynamic)
  for (int64_t r = 0; r < S; r++) {
    static thread_local Scratch scratch;
    scratch.w.resize(V + VL);
    float* w = scratch.w.data();
    const float* x = changes.apply(raw + r * V, r, V, scratch.scores);
    int64_t token = 0;
    if (!sane(raw + r * V, V)) {
      token = -1;
    } else if (changes.edits(r) && !sane(x, V)) {
      token = -2;
    } else if (temperature[r] == 0) {
      float top = largest(x, V)[0];
      while (token < V - 1 && x[token] != top) token++;
    } else {
      double all = weigh(x, V, temperature[r], w);
      if (top_k[r] < V) {
        scratch.keep(V, top_k[r], INFINITY, all);
        all = total(w, V);
      }
      if (top_p[r] < 1) {
        scratch.keep(V, V, top_p[r] * all, all);
        all = total(w, V);
      }
      if (typical_p != nullptr && typical_p[r] < 1) {
        scratch.keep_typical(x, V, typical_p[r] * all, all);
        all = total(w, V);
      }
      token = draw(w, V, uniform[r] * all);
    }
    tokens[r] = token;
    if (wanted[r] && token >= 0) {
      const float* y = raw + r * V;
      double all = weigh(y, V, 1.0f, w);
      logprobs[r] = log_softmax(y[token], largest(y, V)[0], std::log(all));
    } else {
      logprobs[r] = 0;
    }
  }
}
