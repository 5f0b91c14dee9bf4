// Log-softmax of rows at given tokens and at their best ones. Included after sampling.h inside the namespace of one
// instruction set.

// The n tokens of the largest scores, best first, equals by id.
static void find_best(const float* x, int64_t V, int64_t n, std::vector<Weighed>& best) {
  auto before = [](const Weighed& a, const Weighed& b) { return a.w > b.w || (a.w == b.w && a.id < b.id); };
  best.clear();
  for (int64_t i = 0; i < n; i++) best.push_back({x[i], i});
  std::sort(best.begin(), best.end(), before);
  if (n == 0) return;
  for (int64_t i = n; i < V;) {
    if (i + VL <= V) {
      ivec better = load(x + i) > best.back().w;
      int32_t any = 0;
      for (int j = 0; j < VL; j++) any |= better[j];
      if (any == 0) {
        i += VL;
        continue;
      }
    }
    for (int64_t end = std::min(i + VL, V); i < end; i++) {
      if (!(x[i] > best.back().w)) continue;
      best.pop_back();
      Weighed found = {x[i], i};
      best.insert(std::upper_bound(best.begin(), best.end(), found, before), found);
    }
  }
}

// raw [S, V]; per row a token and how many best ones, `most` at most. Writes at [S], ids and best [S, most]; a row that
// isn't sane has NaN.
static void logprobs(const float* raw, int64_t S, int64_t V, const int64_t* tokens, const int64_t* count, int64_t most,
                     double* at, int64_t* ids, double* best) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t r = 0; r < S; r++) {
    static thread_local std::vector<float> w;
    static thread_local std::vector<Weighed> found;
    w.resize(V + VL);
    const float* x = raw + r * V;
    bool told = sane(x, V);
    float top = largest(x, V)[0];
    double log_sum = told ? std::log(weigh(x, V, 1.0f, w.data())) : NAN;
    at[r] = log_softmax(x[tokens[r]], top, log_sum);
    find_best(x, V, told ? count[r] : 0, found);
    for (size_t i = 0; i < found.size(); i++) {
      ids[r * most + i] = found[i].id;
      best[r * most + i] = log_softmax(found[i].w, top, log_sum);
    }
  }
}
