/** At most so many at a time; the others wait in line. */
export class Lanes {
  #free;
  #line = [];

  constructor(count) {
    this.#free = count;
  }

  /** Wait for a lane, to be given back. Throws what `signal` was aborted with. */
  async take(signal) {
    if (this.#free > 0) {
      this.#free -= 1;
      return;
    }
    await new Promise((resolve, reject) => {
      this.#line.push(resolve);
      signal.addEventListener("abort", () => {
        const place = this.#line.indexOf(resolve);
        if (place < 0) return;
        this.#line.splice(place, 1);
        reject(signal.reason);
      });
    });
  }

  give() {
    const next = this.#line.shift();
    if (next) next();
    else this.#free += 1;
  }
}
