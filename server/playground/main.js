/** Wires the page: the setup, the voices, the answers, the code, the key. */

import { ApiError, address, events, getJson, key } from "./api.js";
import { Card } from "./cards.js";
import { Controls } from "./controls.js";
import { $, calm, copy, el, say } from "./dom.js";
import { Lanes } from "./lanes.js";
import { curl, openai } from "./snippets.js";
import { BASE, dice, fresh, fromHash, generateBody, toHash } from "./state.js";
import { VoiceList } from "./voices.js";

const EXAMPLES = ["Quote by Oscar Wilde:", "Quote by Jane Austen:", "On love:", "Maxim:", "Politics,", "Once upon a time"];
const FAVOURITES = ["quotes", "wilde"];
const LANES = 5; // a browser opens six connections to a host; one is left for everything else

const linked = fromHash(location.hash);
const state = linked ?? fresh();
const cards = new Map();
const running = new Map(); // card -> AbortController
const lanes = new Lanes(LANES);
let chosen = linked !== null;
let baseName = "";
let up = false;
let addressTimer = 0;

const controls = new Controls(state, changed);
const voices = new VoiceList(pick, loaded);

function changed() {
  controls.show();
  showCode();
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => history.replaceState(null, "", toHash(state)), 300); // browsers allow so many a second
}

function pick(names) {
  state.voices = names;
  chosen = true;
  showCards();
  changed();
}

function loaded() {
  if (!chosen && voices.servable.length) {
    const liked = FAVOURITES.filter((name) => voices.servable.includes(name));
    pick([BASE, ...(liked.length ? liked : voices.servable.slice(0, 2))]);
  }
  for (const [voice, card] of cards) card.update(voices.record(voice));
  showCode();
}

function showCards() {
  for (const [voice, card] of cards) {
    if (state.voices.includes(voice)) continue;
    running.get(card)?.abort();
    card.node.remove();
    cards.delete(voice);
  }
  for (const voice of state.voices) {
    if (cards.has(voice)) continue;
    const card = new Card(voice, voices.record(voice), { stop, again, remove, prompt: setPrompt });
    cards.set(voice, card);
    if (up) card.readReport();
  }
  state.voices.forEach((voice, i) => {
    const node = cards.get(voice).node;
    if ($("#cards").children[i] !== node) $("#cards").insertBefore(node, $("#cards").children[i] ?? null);
  });
  $("#no-voice").hidden = state.voices.length > 0;
  voices.pick(state.voices);
}

function showCode() {
  const select = $("#code-voice");
  const before = select.options.length ? select.value : null;
  select.replaceChildren(...state.voices.map((voice) => el("option", { value: voice }, voices.record(voice).name)));
  select.value = state.voices.includes(before) ? before : state.voices.find((voice) => voice !== BASE) ?? state.voices[0] ?? "";
  const [voice, locked] = [select.value, Boolean(key.get())];
  const language = $("input[name=language]:checked").value;
  $("#code").textContent =
    language === "curl"
      ? curl(state, voice, address("generate"), locked)
      : openai(state, voice, address("v1"), locked, baseName);
}

function setPrompt(text) {
  state.prompt = text;
  $("#prompt").value = text;
  $("#prompt").focus();
  notice("");
  changed();
}

function notice(text) {
  $("#notice").textContent = text;
}

function remove(card) {
  pick(state.voices.filter((voice) => voice !== card.voice));
  $("#prompt").focus();
}

function stop(card) {
  running.get(card)?.abort();
}

function stopAll() {
  for (const abort of running.values()) abort.abort();
}

function again(card) {
  ask(card, generateBody(state, card.voice));
}

function generate() {
  if (!state.voices.length) return notice("Pick a voice first: the base or an adapter.");
  if (!state.prompt) {
    $("#prompt").focus();
    return notice("Write a prompt first, or take one of the examples.");
  }
  notice("");
  stopAll();
  if (state.sampled && !state.keep) state.seed = dice();
  changed();
  say(`Asking ${state.voices.length} voices`);
  for (const voice of state.voices) ask(cards.get(voice), generateBody(state, voice));
  if ($("#cards").getBoundingClientRect().top > innerHeight * 0.7) {
    $("#answers").scrollIntoView({ behavior: calm() ? "auto" : "smooth", block: "start" });
  }
}

async function ask(card, body) {
  running.get(card)?.abort();
  const abort = new AbortController();
  const current = () => running.get(card) === abort;
  running.set(card, abort);
  showBusy();
  card.begin(body.inputs);
  try {
    await lanes.take(abort.signal);
    try {
      card.sent();
      let whole = false;
      for await (const event of events("generate_stream", body, abort.signal)) {
        if (!current()) return;
        whole = card.push(event);
      }
      if (!whole) throw new ApiError(200, "", "The answer broke off.");
    } finally {
      lanes.give();
    }
  } catch (error) {
    if (!current()) return;
    if (abort.signal.aborted) card.stopped();
    else card.failed(error);
    if (error.status === 401) askKey(error.message);
  } finally {
    if (current()) running.delete(card);
    showBusy();
    if (!running.size) voices.load().catch((error) => say(error.message));
  }
}

function showBusy() {
  $("#stop").hidden = running.size === 0;
  document.body.dataset.busy = running.size > 0;
}

function askKey(why) {
  if ($("#key-dialog").open) return;
  if (why) $("#key-why").textContent = why;
  $("#key").value = key.get();
  $("#key-dialog").showModal();
  $("#key").select();
}

function showKey() {
  $("#key-label").textContent = key.get() ? "Key set" : "Key";
  showCode();
}

function banner(text) {
  $("#banner").textContent = text;
  $("#banner").hidden = !text;
}

async function start() {
  for (;;) {
    try {
      await getJson("ready");
      break;
    } catch (error) {
      banner(error.status === 503 ? `Not ready yet: ${error.message}` : `${error.message} Trying again …`);
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(1, error.retryAfter)));
    }
  }
  banner("");
  try {
    const info = await getJson("info");
    baseName = info.model_id;
    const facts = [info.model_id, info.model_device_type, info.model_dtype, `${info.max_total_tokens} positions`];
    $("#served").textContent = facts.filter(Boolean).join(" · ");
    controls.limit(info.max_total_tokens - 1);
    voices.setBase(baseName);
    await voices.load();
    if (!up) for (const card of cards.values()) card.readReport();
    up = true;
  } catch (error) {
    if (error.status === 401) return askKey("This server wants a key. It stays in this tab and is gone when you close it.");
    banner(error.message);
  }
}

function theme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => $("#theme").setAttribute("aria-pressed", String(dark()));
  $("#theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    show();
    try {
      localStorage.setItem("chorus-theme", root.dataset.theme);
    } catch {
      console.info("Storage is closed: the theme is kept for this visit only.");
    }
  });
  system.addEventListener("change", show);
  show();
}

function listen() {
  $("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("#prompt").addEventListener("input", () => {
    state.prompt = $("#prompt").value;
    changed();
  });
  $("#stop").addEventListener("click", stopAll);
  document.addEventListener("keydown", (event) => {
    if ($("#key-dialog").open) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
    else if (event.key === "Escape" && running.size) stopAll();
    else return;
    event.preventDefault();
  });
  $("#copy-link").addEventListener("click", (event) => copy(new URL(toHash(state), location.href).href, event.currentTarget));
  $("#copy-code").addEventListener("click", (event) => copy($("#code").textContent, event.currentTarget));
  $("#code-voice").addEventListener("change", showCode);
  for (const radio of document.querySelectorAll("input[name=language]")) radio.addEventListener("change", showCode);
  $("#open-key").addEventListener("click", () => askKey(""));
  $("#key-dialog").addEventListener("close", () => {
    const wanted = $("#key-dialog").returnValue;
    $("#key-dialog").returnValue = "";
    if (wanted) {
      up = false;
      key.set(wanted === "use" ? $("#key").value.trim() : "");
      showKey();
      start();
    }
    $("#key").value = "";
  });
  addEventListener("hashchange", () => {
    const other = fromHash(location.hash);
    if (other) apply(other);
  });
}

function apply(other) {
  chosen = true;
  Object.assign(state, other);
  $("#prompt").value = state.prompt;
  controls.show();
  showCards();
  showCode();
}

for (const text of EXAMPLES) {
  $("#examples").append(el("button", { type: "button", class: "chip", onclick: () => setPrompt(text) }, text));
}
if (matchMedia("(max-width: 60rem)").matches) $("#sampling-panel").open = false;
$("#prompt").value = state.prompt;
theme();
listen();
controls.show();
showCards();
showKey();
start();
