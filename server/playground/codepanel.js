/** The panel with this request in code, for one of the voices that are picked. */

import { address, key } from "./api.js";
import { $, copy, el } from "./dom.js";
import { curl, openai } from "./snippets.js";
import { BASE } from "./state.js";

export class CodePanel {
  #chosen = null; // the voice that a person chose for it, if any
  #setup = null;
  #base = null;

  constructor() {
    $("#code-voice").addEventListener("change", () => {
      this.#chosen = $("#code-voice").value;
      this.#write();
    });
    for (const radio of document.querySelectorAll("input[name=language]")) radio.addEventListener("change", () => this.#write());
    $("#copy-code").addEventListener("click", (event) => copy($("#code").textContent, event.currentTarget));
  }

  /** `setup` as it is sent; `nameOf(voice)`; `base`: the base model's name, null if it is not known. */
  show(setup, nameOf, base) {
    [this.#setup, this.#base] = [setup, base];
    const { voices } = setup;
    const select = $("#code-voice");
    select.replaceChildren(...voices.map((voice) => el("option", { value: voice }, nameOf(voice))));
    select.value = voices.includes(this.#chosen) ? this.#chosen : voices.find((voice) => voice !== BASE) ?? voices[0] ?? "";
    select.disabled = $("#copy-code").disabled = !voices.length;
    this.#write();
  }

  #write() {
    const voice = $("#code-voice").value;
    const locked = key.wanted || Boolean(key.get());
    const inCurl = $("input[name=language]:checked").value === "curl";
    const text = () =>
      inCurl
        ? curl(this.#setup, voice, address("generate"), locked)
        : openai(this.#setup, voice, address("v1"), locked, this.#base);
    $("#code").textContent = this.#setup.voices.length ? text() : "";
  }
}
