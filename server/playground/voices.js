/** The list of voices: the base, then adapters and aliases a page at a time, with where each stands. */

import { getJson } from "./api.js";
import { $, el } from "./dom.js";
import { BASE } from "./state.js";

const PAGE = 100;
const SERVABLE = new Set(["ready", "loading", "absent"]);
const SAID = { absent: "on disk", ready: "ready", loading: "loading", refused: "refused", failed: "failed" };
const EXPLAINED = {
  absent: "Read when it is first asked for",
  ready: "On the device",
  loading: "On its way to the device",
  refused: "Can't be served",
  failed: "Could not be read; tried again after a while",
};
const ASKING = "Asking for the voices …";
const NAMED = /^[A-Za-z0-9][A-Za-z0-9._@:,+-]{0,400}$/;

const bytes = (n) => (n < 1e6 ? `${Math.round(n / 1e3)} kB` : `${(n / 1e6).toFixed(1)} MB`);
const weighted = (target) => (target.weight === 1 ? target.ref : `${target.ref} × ${target.weight}`);

/** What a record says in one line. */
export function described(record, aliases = []) {
  if (record.kind === "base") return "the model itself, without an adapter";
  if (record.kind === "alias") return `alias of ${(record.targets ?? []).map(weighted).join(" + ")}`;
  if (record.kind === "unlisted") return "by name";
  const parts = [record.rank && `rank ${record.rank}`, record.digest?.slice(0, 8), record.nbytes && bytes(record.nbytes)];
  if (aliases.length) parts.push(`also ${aliases.join(", ")}`);
  return parts.filter(Boolean).join(" · ");
}

export class VoiceList {
  #records = new Map();
  #rows = new Map();
  #picked = [];
  #next = null;
  #listed = false;
  #trouble = ASKING; // why there is no list, or no newer one
  #onPick;
  #onLoaded;

  /** `onPick(voices)` when a person changes the choice, `onLoaded()` when records came. */
  constructor(onPick, onLoaded) {
    this.#onPick = onPick;
    this.#onLoaded = onLoaded;
    this.setBase("base model");
    $("#find").addEventListener("input", () => this.#filter());
    $("#find").addEventListener("keydown", (event) => {
      const wanted = this.#wanted;
      if (event.key !== "Enter" || !wanted) return;
      const row = this.#rows.get(wanted) ?? [...$("#voices").children].find((each) => !each.hidden);
      row?.querySelector("input:enabled, button")?.click();
    });
    $("#more").addEventListener("click", () => this.#page(this.#next, PAGE).catch((error) => this.failed(error)));
    $("#refresh").addEventListener("click", () => this.load().catch(() => {})); // it has told
  }

  setBase(name) {
    this.#records.set(BASE, { name, kind: "base", state: "ready" });
    this.#render();
  }

  record(voice) {
    return this.#records.get(voice) ?? { name: voice, kind: "unlisted" };
  }

  /** Names of adapters that can be picked. */
  get servable() {
    return [...this.#records.values()].filter((r) => r.kind === "adapter" && SERVABLE.has(r.state)).map((r) => r.name);
  }

  /** Ask for the list again, as far as it was shown. Throws ApiError. */
  async load() {
    $("#voices").setAttribute("aria-busy", "true");
    if (!this.#listed) this.#tell(ASKING);
    const count = Math.max(PAGE, Math.ceil((this.#records.size - 1) / PAGE) * PAGE);
    try {
      await this.#page("", Math.min(1000, count));
    } catch (error) {
      this.failed(error);
      throw error;
    }
  }

  /** The list could not be had. */
  failed(error) {
    $("#voices").setAttribute("aria-busy", "false");
    this.#tell(error.status === 401 ? "The list needs the key." : error.message);
  }

  /** Show what is picked. */
  pick(voices) {
    this.#picked = voices;
    this.#render();
  }

  /** The names after `after`, beside what is here; from the beginning in its place. */
  async #page(after, limit) {
    const answer = await getJson(`v1/adapters?limit=${limit}&after=${encodeURIComponent(after)}`);
    const records = after ? this.#records : new Map([[BASE, this.#records.get(BASE)]]);
    for (const record of answer.data) records.set(record.name, record);
    for (const { name, reason } of answer.refused ?? []) {
      if (!records.has(name)) records.set(name, { name, kind: "adapter", state: "refused", reason });
    }
    [this.#records, this.#listed, this.#trouble] = [records, true, ""];
    $("#voices").setAttribute("aria-busy", "false");
    this.#next = answer.has_more ? answer.next : null;
    $("#more").hidden = this.#next === null;
    this.#render();
    this.#onLoaded();
  }

  #tell(trouble) {
    this.#trouble = trouble;
    this.#filter();
  }

  /** What is typed, as the server's names have it: no blanks around the signs of a mix. */
  get #wanted() {
    return $("#find").value.trim().replace(/\s*([,:])\s*/g, "$1");
  }

  #aliases(name) {
    const ofIt = (record) => record.targets?.length === 1 && record.targets[0].ref.split("@")[0] === name;
    return [...this.#records.values()].filter((r) => r.kind === "alias" && ofIt(r)).map((r) => r.name);
  }

  #render() {
    const list = $("#voices");
    const focused = list.contains(document.activeElement) ? document.activeElement : null;
    const unlisted = this.#picked.filter((voice) => !this.#records.has(voice));
    const shown = new Set([...this.#records.keys(), ...unlisted]);
    for (const [voice, row] of this.#rows) {
      if (shown.has(voice)) continue;
      row.remove();
      this.#rows.delete(voice);
    }
    [...shown].forEach((voice, i) => {
      if (!this.#rows.has(voice)) this.#rows.set(voice, this.#row(voice));
      const row = this.#rows.get(voice);
      this.#update(row, voice);
      if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
    });
    $("#picked").textContent = `${this.#picked.length} picked`;
    this.#filter();
    if (focused && document.activeElement !== focused) (focused.isConnected ? focused : $("#find")).focus({ preventScroll: true });
  }

  #row(voice) {
    const box = el("input", { type: "checkbox", onchange: () => this.#toggle(voice, box.checked) });
    const label = el("label", {}, box, el("span", { class: "name" }), el("span", { class: "badge" }));
    return el("li", {}, label, el("p", { class: "meta" }), el("p", { class: "why" }));
  }

  #update(row, voice) {
    const record = this.record(voice);
    const state = record.state ?? "";
    const [box, name, badge] = row.querySelectorAll("input, .name, .badge");
    name.textContent = record.name;
    badge.textContent = SAID[state] ?? "";
    badge.dataset.state = state;
    badge.title = EXPLAINED[state] ?? "";
    box.checked = this.#picked.includes(voice);
    box.disabled = state === "refused" && !box.checked;
    row.querySelector(".meta").textContent = described(record, this.#aliases(voice));
    const changed = record.folder_changed ? "Its folder has changed since; this version is served." : "";
    row.querySelector(".why").textContent = record.reason ?? changed;
  }

  #toggle(voice, on) {
    const others = this.#picked.filter((other) => other !== voice);
    this.#onPick(!on ? others : voice === BASE ? [BASE, ...others] : [...others, voice]);
  }

  #filter() {
    const wanted = this.#wanted;
    let hits = 0;
    for (const [voice, row] of this.#rows) {
      const text = `${this.record(voice).name} ${row.querySelector(".meta").textContent}`.toLowerCase();
      row.hidden = !text.includes(wanted.toLowerCase());
      hits += row.hidden ? 0 : 1;
    }
    $("#add-voice")?.remove();
    if (!hits && NAMED.test(wanted)) {
      const add = () => {
        $("#find").value = "";
        this.#toggle(wanted, true);
      };
      $("#voices").append(
        el("li", { id: "add-voice" }, el("button", { type: "button", class: "quiet wide", onclick: add }, `Add “${wanted}”`)),
      );
    }
    const count = this.#records.size - 1;
    let note = count ? "" : "No adapters yet: publish one, or drop a folder into --adapters-dir.";
    if (this.#trouble) note = this.#trouble;
    else if (wanted && !hits) note = this.#next === null ? "Nothing listed has that name." : `Not among the first ${count}.`;
    $("#voices-note").textContent = note;
  }
}
