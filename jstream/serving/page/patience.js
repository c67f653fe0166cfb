/* Waiting between attempts: longer each time, counted down for whoever looks, cut short by whoever cannot wait. Both
 * kinds of stream use it; it does not know what is attempted. */

import { diagnose } from "./api.js";

const FIRST_WAIT = 1; // seconds
const LONGEST_WAIT = 15;
const LOADING_WAIT = 1; // a model that loads is looked at this often

export class Patience {
  #wait = FIRST_WAIT;
  #wake = null;

  /** `tell(name, detail)` hears of each second of a wait. */
  constructor(tell) {
    this.tell = tell;
  }

  /** What was attempted came about: the next wait is short again. */
  relieved() {
    this.#wait = FIRST_WAIT;
  }

  /** Ends the present wait. */
  hurry() {
    this.#wake?.();
  }

  /**
   * Finds out why there is no stream, tells it and waits until it is worth another attempt.
   * Args: `lost` {full, message}: what the stream itself knows of it.
   * Returns {kind, message}: why there was none as `diagnose` has it; where it is "failed" no attempt will help.
   */
  async mend({ full = false, message = "" } = {}) {
    const why = await diagnose();
    if (why.kind === "failed") return why;
    if (why.kind === "denied") {
      this.tell("denied", why);
      await this.#until(Infinity);
    } else if (why.kind === "loading") {
      this.tell("loading", why);
      await this.#until(LOADING_WAIT);
    } else {
      const name = full || why.kind === "full" ? "full" : "reconnecting";
      await this.#countdown(name, { ...why, message: why.kind === "unreachable" ? why.message : message });
    }
    return why;
  }

  async #countdown(name, detail) {
    let left = this.#wait;
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT);
    for (; left > 0; left -= 1) {
      this.tell(name, { ...detail, seconds: left });
      if (await this.#until(1)) break;
    }
  }

  /** Resolves after some seconds, or to true as soon as someone is in a hurry. */
  #until(seconds) {
    return new Promise((resolve) => {
      const timer = seconds < Infinity ? setTimeout(() => resolve(false), 1000 * seconds) : 0;
      this.#wake = () => {
        clearTimeout(timer);
        resolve(true);
      };
    });
  }
}
