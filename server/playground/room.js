/** How many tokens fit after a prompt: the server counts it, where that may matter. */

import { postJson } from "./api.js";

export class Room {
  #positions = Infinity;
  #prompt = null; // the last one that was counted
  #left = Infinity;
  #counting = null;
  #onCounted;

  /** `onCounted()` when more is known. */
  constructor(onCounted) {
    this.#onCounted = onCounted;
  }

  /** Of the model, for prompt and answer. */
  setPositions(positions) {
    this.#positions = positions;
    this.#prompt = null;
  }

  /** The most tokens after `prompt`, as far as is known; Infinity is unknown. */
  known(prompt) {
    return prompt === this.#prompt ? this.#left : Infinity;
  }

  /** The most tokens after `prompt`; Infinity if `wanted` fit anyway, or if nobody could say. */
  async after(prompt, wanted) {
    const bytes = new TextEncoder().encode(prompt).length; // no token is less than one
    if (bytes + wanted <= this.#positions) return Infinity;
    if (prompt !== this.#prompt) {
      [this.#prompt, this.#left] = [prompt, Infinity];
      this.#counting = this.#count(prompt);
    }
    return this.#counting;
  }

  async #count(prompt) {
    try {
      const { count } = await postJson("tokenize", { prompt });
      const left = this.#positions > count ? this.#positions - count : Infinity; // the server says what is too long
      if (prompt === this.#prompt) {
        this.#left = left;
        this.#onCounted();
      }
      return left;
    } catch {
      if (prompt === this.#prompt) this.#prompt = null; // asked anew next time; the request itself says what is wrong
      return Infinity;
    }
  }
}
