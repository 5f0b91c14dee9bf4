/** A card for each voice that is picked: its answer as it comes, where that ended and why, and its report. */

import { getJson } from "./api.js";
import { copy, el, say } from "./dom.js";
import { ownPrompt, reportView } from "./report.js";
import { BASE } from "./state.js";
import { described } from "./voices.js";

const tokens = (n) => `${n} token${n === 1 ? "" : "s"}`;
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const ENDED = {
  eos_token: (n) => `Ended by itself (EOS) after ${tokens(n)}`,
  length: (n) => `Cut off at the limit of ${tokens(n)}`,
  stop_sequence: (n) => `Met a stop string after ${tokens(n)}`,
  stopped: (n) => `Stopped by you after ${tokens(n)}`,
};
const TITLES = { 401: "The key is missing or wrong", 404: "There is no such voice", 429: "The server is full", 503: "Not available now" };
const OF_TYPE = { adapter_refused: "This adapter was refused", rate_limited: "Your own limit is reached" };

/** A calm colour of its own for each name. */
function hue(name) {
  let sum = 7;
  for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) % 360;
  return sum;
}

export class Card {
  #parts = {};
  #times = {};
  #count = 0;
  #waits = null;
  #actions;

  /** `actions`: stop(card), again(card), remove(card), prompt(text). */
  constructor(voice, record, actions) {
    this.voice = voice;
    this.#actions = actions;
    this.#build();
    this.update(record);
  }

  update(record) {
    this.#parts.name.textContent = record.name;
    this.#parts.meta.textContent = described(record);
    this.#parts.remove.setAttribute("aria-label", `Remove ${record.name}`);
  }

  get running() {
    return ["waiting", "streaming"].includes(this.node.dataset.status);
  }

  /** A request is about to be sent for `prompt`. */
  begin(prompt) {
    clearInterval(this.#waits);
    this.#count = 0;
    this.#times = {};
    this.#parts.prompt.textContent = prompt;
    this.#parts.out.textContent = "";
    this.#status("waiting", "waiting", "Waiting for its turn …");
  }

  sent() {
    this.#times.sent = performance.now();
    this.#parts.reason.textContent = "Asked …";
  }

  /** One event of the stream; true if it was the last. */
  push({ index, token, generated_text, details }) {
    const now = performance.now();
    if (this.#times.first === undefined) {
      this.#times.first = now;
      this.#status("streaming", "streaming", "");
    }
    this.#times.last = now;
    this.#count = index;
    if (!token.special) this.#parts.out.append(token.text);
    if (!details) {
      this.#stats();
      return false;
    }
    if (generated_text !== null) this.#parts.out.textContent = generated_text;
    this.#count = details.generated_tokens;
    this.#end("done", details.finish_reason);
    return true;
  }

  stopped() {
    this.#end("stopped", "stopped");
  }

  /** The request failed; it can be sent again once `retryAfter` is over. */
  failed(error) {
    const title = OF_TYPE[error.type] ?? TITLES[error.status];
    this.#status("error", "error", title ? `${title}: ${error.message}` : error.message);
    this.#stats();
    say(`${this.#parts.name.textContent}: ${error.message}`);
    const { again } = this.#parts;
    let left = Math.ceil(error.retryAfter);
    const show = () => {
      again.disabled = left > 0;
      again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left-- <= 0) clearInterval(this.#waits);
    };
    show();
    this.#waits = setInterval(show, 1000);
  }

  /** Ask for its report; the base and a mix have none. */
  async readReport() {
    if (this.voice === BASE || /[,:]/.test(this.voice)) return;
    const { report, inner, hint } = this.#parts;
    try {
      let record = await getJson(`v1/adapters/${encodeURIComponent(this.voice)}`);
      if (record.kind === "alias" && record.targets?.length === 1) {
        record = await getJson(`v1/adapters/${encodeURIComponent(record.targets[0].ref)}`);
      }
      if (record.kind === "alias") return;
      inner.replaceChildren(...reportView(record));
      report.hidden = false;
      const own = ownPrompt(record.report);
      if (own === null) return;
      const use = el("button", { type: "button", class: "link", onclick: () => this.#actions.prompt(own) }, `“${own}”`);
      hint.replaceChildren("Trained for prompts like ", use);
    } catch (error) {
      inner.replaceChildren(el("p", { class: "note" }, `Its report could not be read: ${error.message}`));
      report.hidden = error.status === 404;
    }
  }

  #build() {
    const button = (label, act, kind = "quiet") => el("button", { type: "button", class: kind, onclick: act }, label);
    const id = `card-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
    const parts = (this.#parts = {
      name: el("h3", { id }),
      meta: el("p", { class: "meta" }),
      prompt: el("span", { class: "prompt" }),
      out: el("span", { class: "out" }),
      hint: el("p", { class: "hint" }, this.voice === BASE ? "The frozen model, for comparison." : "Waits for a prompt."),
      reason: el("p", { class: "reason" }),
      stats: el("dl", { class: "stats" }),
      stop: button("Stop", () => this.#actions.stop(this), "quiet stop"),
      again: button("Try again", () => this.#actions.again(this)),
      copied: button("Copy text", (event) => copy(parts.prompt.textContent + parts.out.textContent, event.currentTarget)),
      inner: el("div", { class: "inner" }),
      remove: button("×", () => this.#actions.remove(this), "quiet remove"),
    });
    parts.report = el("details", { class: "report", hidden: true }, el("summary", {}, "Report"), parts.inner);
    const end = el("span", { class: "end", "aria-hidden": "true" });
    this.node = el(
      "article",
      { class: "card", "aria-labelledby": id, "data-voice": this.voice },
      el("header", {}, el("div", {}, parts.name, parts.meta), parts.remove),
      el("p", { class: "text" }, parts.prompt, parts.out, end),
      parts.hint,
      el("footer", {}, parts.reason, parts.stats, el("div", { class: "buttons" }, parts.stop, parts.again, parts.copied)),
      parts.report,
    );
    this.node.style.setProperty("--hue", hue(this.voice));
    this.node.dataset.status = "idle";
  }

  #status(status, reason, text) {
    this.node.dataset.status = status;
    this.node.dataset.reason = reason;
    this.node.setAttribute("aria-busy", String(this.running));
    this.#parts.reason.textContent = text;
    if (status === "waiting") this.#parts.stats.replaceChildren();
  }

  #end(status, reason) {
    const text = (ENDED[reason] ?? ((n) => `Ended (${reason}) after ${tokens(n)}`))(this.#count);
    this.#status(status, reason, text);
    this.#stats();
    say(`${this.#parts.name.textContent}: ${text}`);
  }

  #stats() {
    const { sent, first, last } = this.#times;
    const rate = this.#count > 1 && last > first ? ((this.#count - 1) / (last - first)) * 1000 : null;
    const shown = [
      ["tokens", this.#count || null],
      ["tokens/s", rate && rate.toFixed(rate < 10 ? 1 : 0)],
      ["to first token", first === undefined ? null : seconds(first - sent)],
    ].filter(([, value]) => value !== null);
    this.#parts.stats.replaceChildren(
      ...shown.map(([name, value]) => el("div", {}, el("dd", {}, String(value)), el("dt", {}, name))),
    );
  }
}
