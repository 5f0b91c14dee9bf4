/** Asks for the API key, which stays in the tab. */

import { key } from "./api.js";
import { $ } from "./dom.js";

const STAYS = "It stays in this tab and is gone when you close it.";
const MAY = `This server may ask for a key. ${STAYS}`;
const WANTS = `This server wants a key. ${STAYS}`;
const REFUSED = `The server refused this key: mend it, or use another. ${STAYS}`;

export class KeyDialog {
  #dialog = $("#key-dialog");

  /** `onChange()` when a key was set or forgotten. */
  constructor(onChange) {
    $("#open-key").addEventListener("click", () => this.#show(key.wanted && !key.get() ? WANTS : MAY));
    this.#dialog.addEventListener("close", () => {
      const answer = this.#dialog.returnValue;
      this.#dialog.returnValue = "";
      if (answer) key.set(answer === "use" ? $("#key").value.trim() : "");
      $("#key").value = "";
      this.#label();
      if (answer) onChange();
    });
    this.#label();
  }

  get open() {
    return this.#dialog.open;
  }

  /** The server answered 401. */
  ask() {
    this.#show(key.get() ? REFUSED : WANTS);
  }

  #show(why) {
    if (this.open) return;
    $("#key-why").textContent = why;
    $("#key").value = key.get();
    this.#dialog.showModal();
    $("#key").select();
  }

  #label() {
    $("#key-label").textContent = key.get() ? "Key set" : "Key";
  }
}
