/* The running transcript: what was asked, said and missed, each line with its time. It is a live region, so what it
 * holds is spoken by screen readers as it comes; the subtitle over the picture is not. */

import { clock } from "./record.js";

const MOST_LINES = 2000; // older ones leave the page; the files keep them
const AT_THE_FOOT = 40; // pixels

export class Transcript {
  #lines = new Map(); // reply index → element
  #marked = null;
  #replies = []; // {time, element} in order, for the nearest

  /** Args: `log`, the element; `newest`, the button that leads back to the foot; `jump(time)` goes to a moment. */
  constructor(log, newest, jump) {
    Object.assign(this, { log, newest, jump });
    log.addEventListener("scroll", () => (newest.hidden = this.#following), { passive: true });
    newest.addEventListener("click", () => {
      log.scrollTop = log.scrollHeight;
      newest.hidden = true;
    });
  }

  clear() {
    this.#replies = [];
    this.#lines.clear();
    this.#marked = null;
    this.log.replaceChildren();
    this.newest.hidden = true;
  }

  reply(reply) {
    const element = this.#line("reply", reply.time, reply.text);
    this.#lines.set(reply.index, element);
    this.#replies.push({ time: reply.time, element });
  }

  /** A question whose time is not known yet. Returns what `asked` takes. */
  question(text) {
    return this.#line("question", null, text);
  }

  asked(element, time) {
    const moment = element.querySelector(".moment");
    moment.replaceWith(this.#moment(time));
    element.classList.remove("waiting");
  }

  note(time, text) {
    return this.#line("note", time, text);
  }

  /** Marks the line of the reply at a time, or none. */
  mark(index) {
    this.#marked?.classList.remove("marked");
    this.#marked?.removeAttribute("aria-current");
    this.#marked = this.#lines.get(index) ?? null;
    if (!this.#marked) return;
    this.#marked.classList.add("marked");
    this.#marked.setAttribute("aria-current", "true");
    // The log alone is scrolled: scrollIntoView would move the page on a phone, away from the picture.
    const line = this.#marked.getBoundingClientRect();
    const box = this.log.getBoundingClientRect();
    if (line.top < box.top || line.bottom > box.bottom) {
      this.log.scrollTop += line.top - box.top - (box.height - line.height) / 2;
    }
  }

  get #following() {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    return scrollHeight - scrollTop - clientHeight < AT_THE_FOOT;
  }

  #line(kind, time, text) {
    const following = this.#following;
    const element = document.createElement("div");
    element.className = `line ${kind}`;
    const said = document.createElement("p");
    said.textContent = text;
    said.dir = "auto";
    if (kind === "question") {
      const you = document.createElement("span");
      you.className = "who";
      you.textContent = "You asked";
      said.prepend(you, " ");
    }
    if (kind === "question" && time === null) element.classList.add("waiting");
    element.append(this.#moment(time), said);
    this.log.append(element);
    while (this.log.childElementCount > MOST_LINES) this.log.firstElementChild.remove();
    if (following) this.log.scrollTop = this.log.scrollHeight;
    return element;
  }

  #moment(time) {
    if (time === null) {
      const waiting = document.createElement("span");
      waiting.className = "moment";
      waiting.textContent = "…";
      return waiting;
    }
    const button = document.createElement("button");
    button.type = "button";
    button.className = "moment";
    button.textContent = clock(time);
    button.setAttribute("aria-label", `Go to ${clock(time)}`);
    button.addEventListener("click", () => this.jump(time));
    return button;
  }
}
