/** The sampling controls: each number has a slider and a field that agree. */

import { $, el } from "./dom.js";
import { FIELDS, allowed, allowedSeed, dice } from "./state.js";

export class Controls {
  #inputs = {};
  #hints = {};
  #left = Infinity;
  #state;

  /** `onChange()` after a person changed something; the state is changed in place. */
  constructor(state, onChange) {
    this.#state = state;
    for (const [name, field] of Object.entries(FIELDS)) $("#fields").append(this.#field(name, field, onChange));
    for (const radio of document.querySelectorAll("input[name=mode]")) {
      radio.addEventListener("change", () => {
        state.sampled = radio.value === "sampled";
        this.#follow(onChange);
      });
    }
    $("#seed").addEventListener("input", () => {
      const seed = allowedSeed($("#seed").value);
      if (seed === undefined) return;
      Object.assign(state, { seed, keep: true });
      $("#keep").checked = true;
      onChange();
    });
    $("#seed").addEventListener("change", () => this.show());
    $("#dice").addEventListener("click", () => {
      state.seed = dice();
      this.#follow(onChange);
    });
    $("#keep").addEventListener("change", () => {
      state.keep = $("#keep").checked;
      onChange();
    });
    $("#stops").addEventListener("input", () => {
      state.stops = $("#stops").value;
      onChange();
    });
  }

  /** The longest answer that the model has room for. */
  limit(longest) {
    FIELDS.max_tokens.max = longest;
    for (const input of this.#inputs.max_tokens) input.max = longest;
    this.#state.max_tokens = Math.min(this.#state.max_tokens, longest);
    this.show();
  }

  /** `left`: how many tokens fit after the prompt. */
  show(left = this.#left) {
    const state = this.#state;
    this.#left = left;
    for (const [name, inputs] of Object.entries(this.#inputs)) {
      for (const input of inputs) {
        input.value = state[name];
        input.disabled = Boolean(FIELDS[name].sampled) && !state.sampled;
      }
    }
    $(`input[name=mode][value=${state.sampled ? "sampled" : "greedy"}]`).checked = true;
    for (const id of ["#seed", "#dice", "#keep"]) $(id).disabled = !state.sampled;
    $("#seed").value = state.seed;
    $("#keep").checked = state.keep;
    $("#stops").value = state.stops;
    const mode = state.sampled ? `temperature ${state.temperature}` : "greedy";
    $("#sampling-brief").textContent = `${mode}, ${Math.min(state.max_tokens, left)} tokens`;
    this.#hints.max_tokens.textContent = left < state.max_tokens ? `room for ${left}` : FIELDS.max_tokens.hint;
  }

  #follow(onChange) {
    this.show();
    onChange();
  }

  #field(name, field, onChange) {
    const { label, hint, min, max, step } = field;
    const change = (event) => {
      const value = allowed(name, event.target.value);
      if (value === undefined) return;
      this.#state[name] = value;
      for (const input of this.#inputs[name]) if (input !== event.target) input.value = value;
      onChange();
    };
    const done = () => this.#follow(onChange);
    const common = { min, max, step, oninput: change, onchange: done };
    const exact = el("input", { type: "number", id: name, inputmode: step === 1 ? "numeric" : "decimal", ...common });
    const slider = el("input", { type: "range", "aria-label": label, ...common });
    this.#inputs[name] = [exact, slider];
    this.#hints[name] = el("small", {}, hint);
    return el("div", { class: "field" }, el("label", { for: name }, label, " ", this.#hints[name]), exact, slider);
  }
}
