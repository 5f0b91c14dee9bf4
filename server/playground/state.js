/** What a setup is, its way into the address and back, and the request it stands for. It never holds the key. */

export const FIELDS = {
  temperature: { label: "Temperature", min: 0.05, max: 2, step: 0.05, value: 0.8, sampled: true, hint: "higher is bolder" },
  top_p: { label: "Top-p", min: 0.05, max: 1, step: 0.01, value: 0.95, sampled: true, hint: "1 is off" },
  top_k: { label: "Top-k", min: 0, max: 200, step: 1, value: 0, sampled: true, hint: "0 is off" },
  repetition_penalty: { label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1, hint: "1 is off" },
  max_tokens: { label: "Max tokens", min: 1, max: 1024, step: 1, value: 64, hint: "longest answer" },
};
export const BASE = "";  // the base model's place among the voices

export function dice() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

export function fresh() {
  const numbers = Object.fromEntries(Object.entries(FIELDS).map(([name, field]) => [name, field.value]));
  return { prompt: "Quote by Oscar Wilde:", voices: [BASE], sampled: true, seed: dice(), keep: false, stops: "", ...numbers };
}

/** `value` as the field allows it, or undefined. */
export function allowed(name, value) {
  const { min, max, step } = FIELDS[name];
  const number = Number(value);
  if (value === "" || !Number.isFinite(number)) return undefined;
  const within = Math.min(max, Math.max(min, number));
  return step === 1 ? Math.round(within) : within;
}

export const allowedSeed = (value) => (/^\d{1,16}$/.test(value) && Number.isSafeInteger(Number(value)) ? Number(value) : undefined);

export function toHash(state) {
  const query = new URLSearchParams({ prompt: state.prompt });
  for (const voice of state.voices) voice === BASE ? query.append("base", "1") : query.append("voice", voice);
  query.set("mode", state.sampled ? "sampled" : "greedy");
  for (const name of Object.keys(FIELDS)) query.set(name, state[name]);
  query.set("seed", state.seed);
  if (state.keep) query.set("keep", "1");
  if (state.stops) query.set("stops", state.stops);
  return `#${query}`;
}

/** The setup that an address holds, or null if it holds none; what is missing or wrong is as in a fresh one. */
export function fromHash(hash) {
  const query = new URLSearchParams(hash.slice(1));
  if (!query.has("prompt")) return null;
  const state = fresh();
  state.prompt = query.get("prompt");
  state.voices = [...(query.has("base") ? [BASE] : []), ...new Set(query.getAll("voice").filter(Boolean))];
  state.sampled = query.get("mode") !== "greedy";
  for (const name of Object.keys(FIELDS)) state[name] = allowed(name, query.get(name) ?? "") ?? state[name];
  state.seed = allowedSeed(query.get("seed") ?? "") ?? state.seed;
  state.keep = query.get("keep") === "1";
  state.stops = query.get("stops") ?? "";
  return state;
}

export const stopStrings = (state) => state.stops.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));

/** The same setup with no more tokens than there is room for. */
export const fitted = (state, room) => ({ ...state, max_tokens: Math.min(state.max_tokens, room) });

/** The body of POST /generate and /generate_stream for one voice. */
export function generateBody(state, voice) {
  const parameters = voice === BASE ? {} : { adapter_id: voice };
  parameters.max_new_tokens = state.max_tokens;
  parameters.do_sample = state.sampled;
  if (state.sampled) {
    parameters.temperature = state.temperature;
    if (state.top_p < 1) parameters.top_p = state.top_p;
    if (state.top_k > 0) parameters.top_k = state.top_k;
    parameters.seed = state.seed;
  }
  if (state.repetition_penalty !== 1) parameters.repetition_penalty = state.repetition_penalty;
  if (stopStrings(state).length) parameters.stop = stopStrings(state);
  parameters.details = true;
  return { inputs: state.prompt, parameters };
}
