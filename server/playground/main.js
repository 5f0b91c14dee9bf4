/** Wires the page: the setup, the voices, the answers, the code, the key. */

import { ApiError, events, getJson } from "./api.js";
import { Card } from "./cards.js";
import { CodePanel } from "./codepanel.js";
import { Controls } from "./controls.js";
import { $, calm, copy, el, say } from "./dom.js";
import { KeyDialog } from "./keydialog.js";
import { Lanes } from "./lanes.js";
import { Room } from "./room.js";
import { BASE, dice, fitted, fresh, fromHash, generateBody, toHash } from "./state.js";
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
let baseName = null;
let up = false;
let settleTimer = 0;

const controls = new Controls(state, changed);
const voices = new VoiceList(pick, loaded);
const codePanel = new CodePanel();
const room = new Room(showSetup);
const keyDialog = new KeyDialog(() => {
  up = false;
  showCode();
  start();
});

function showSetup() {
  controls.show(room.known(state.prompt));
  showCode();
}

function changed() {
  showSetup();
  clearTimeout(settleTimer);
  settleTimer = setTimeout(settle, 300); // browsers allow so many changes of the address a second
}

function settle() {
  history.replaceState(null, "", toHash(state));
  room.after(state.prompt, state.max_tokens);
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
  const setup = fitted(state, room.known(state.prompt));
  codePanel.show(setup, (voice) => voices.record(voice).name, baseName);
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
  ask(card, { ...state });
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
  for (const voice of state.voices) ask(cards.get(voice), { ...state });
  if ($("#cards").getBoundingClientRect().top > innerHeight * 0.7) {
    $("#answers").scrollIntoView({ behavior: calm() ? "auto" : "smooth", block: "start" });
  }
}

async function ask(card, setup) {
  running.get(card)?.abort();
  const abort = new AbortController();
  const current = () => running.get(card) === abort;
  running.set(card, abort);
  showBusy();
  card.begin(setup.prompt);
  try {
    await lanes.take(abort.signal);
    try {
      const body = generateBody(fitted(setup, await room.after(setup.prompt, setup.max_tokens)), card.voice);
      abort.signal.throwIfAborted();
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
    if (error.status === 401) askKey();
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

function askKey() {
  showCode(); // it tells of the key now
  keyDialog.ask();
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
    room.setPositions(info.max_total_tokens);
    room.after(state.prompt, state.max_tokens);
    voices.setBase(baseName);
    await voices.load();
    if (!up) for (const card of cards.values()) card.readReport();
    up = true;
  } catch (error) {
    voices.failed(error);
    if (error.status === 401) askKey();
    else banner(error.message);
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
    if (keyDialog.open) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
    else if (event.key === "Escape" && running.size) stopAll();
    else return;
    event.preventDefault();
  });
  $("#copy-link").addEventListener("click", (event) => copy(link(), event.currentTarget));
  $(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address holds the setup
    $("#answers").focus();
  });
  addEventListener("hashchange", () => {
    const other = fromHash(location.hash);
    if (other) apply(other);
  });
}

/** The address of this setup and of its texts. */
const link = () => new URL(toHash({ ...state, keep: true }), location.href).href;

function apply(other) {
  chosen = true;
  Object.assign(state, other);
  $("#prompt").value = state.prompt;
  showCards();
  showSetup();
  room.after(state.prompt, state.max_tokens);
}

for (const text of EXAMPLES) {
  $("#examples").append(el("button", { type: "button", class: "chip", onclick: () => setPrompt(text) }, text));
}
if (matchMedia("(max-width: 60rem)").matches) $("#sampling-panel").open = false;
$("#prompt").value = state.prompt;
theme();
listen();
showCards();
showSetup();
start();
