/* The picture and what lies over it: the subtitle, the veil that says what is being waited for, and the small picture
 * of a moment that was looked up. It shows what it is told and decides nothing. */

import { clock, readingTime } from "./record.js";

const byId = (id) => document.getElementById(id);

export class Stage {
  element = byId("stage");
  view = byId("view");
  #still = byId("still");
  #snapshot = byId("snapshot");
  #subtitle = byId("subtitle");
  #glow = byId("glow").getContext("2d");
  #timer = 0;
  #press = null;
  #urls = new Map(); // element → its object URL

  constructor() {
    byId("veil_button").addEventListener("click", () => this.#press?.());
    byId("peek_close").addEventListener("click", () => this.peek(null));
  }

  /** What there is to begin with: "sample", "camera", "file" or "network". */
  source(kind) {
    this.element.dataset.source = kind;
  }

  /** Shows the choice of what to watch. */
  idle() {
    this.veil(null);
    byId("idle").hidden = false;
  }

  /** Which of the pictures is seen: "view", "still" or "snapshot". */
  show(name) {
    byId("idle").hidden = true;
    for (const element of [this.view, this.#still, this.#snapshot]) element.hidden = element.id !== name;
  }

  /** Says what is being waited for, or nothing: {title, text, spinner, done, total, button, press}. */
  veil(what) {
    byId("veil").hidden = !what;
    if (!what) return;
    byId("idle").hidden = true;
    // The region speaks whenever it changes: what stays the same is left alone, and counting down is not told as news.
    for (const [id, text] of [
      ["veil_title", what.title],
      ["veil_text", what.text ?? ""],
    ]) {
      if (byId(id).textContent !== text) byId(id).textContent = text;
    }
    byId("veil_text").setAttribute("aria-live", what.counting ? "off" : "polite");
    byId("spinner").hidden = !what.spinner;
    const progress = byId("veil_progress");
    progress.hidden = !what.total;
    if (what.total) Object.assign(progress, { max: what.total, value: what.done });
    byId("veil_button").hidden = !what.button;
    byId("veil_button").textContent = what.button ?? "";
    this.#press = what.press ?? null;
  }

  /** Shows a text under the picture until it is read. */
  say(text) {
    clearTimeout(this.#timer);
    this.caption(text);
    this.#timer = setTimeout(() => this.caption(""), 1000 * readingTime(text));
  }

  /** Shows a text under the picture until another call; "" shows none. */
  caption(text) {
    this.#subtitle.hidden = !text;
    this.#subtitle.firstElementChild.textContent = text;
  }

  /** A frame was taken: it colours what lies around the picture, and is the picture itself where `still` is shown. */
  frame(canvas) {
    this.#glow.drawImage(canvas, 0, 0, 16, 9);
    if (this.#still.hidden) return;
    Object.assign(this.#still, { width: canvas.width, height: canvas.height });
    this.#still.getContext("2d").drawImage(canvas, 0, 0);
  }

  /** The newest picture of a network stream. Resolves once it is drawn. */
  async snapshot(blob) {
    this.#draw(this.#snapshot, blob);
    await this.#snapshot.decode();
    this.#glow.drawImage(this.#snapshot, 0, 0, 16, 9);
    return this.#snapshot;
  }

  /** Shows a moment as a small picture with its text; null puts it away. */
  peek(moment) {
    byId("peek").hidden = !moment;
    if (!moment) return this.onpeekclosed?.();
    byId("peek_picture").hidden = !moment.blob;
    if (moment.blob) this.#draw(byId("peek_picture"), moment.blob);
    byId("peek_picture").alt = `The picture at ${clock(moment.time)}`;
    byId("peek_text").textContent = `${clock(moment.time)}  ${moment.text}`;
  }

  /** Whether a moment is shown. */
  get peeking() {
    return !byId("peek").hidden;
  }

  clear() {
    clearTimeout(this.#timer);
    this.caption("");
    this.peek(null);
    this.#glow.clearRect(0, 0, 16, 9);
    this.#snapshot.removeAttribute("src");
  }

  #draw(image, blob) {
    if (this.#urls.has(image)) URL.revokeObjectURL(this.#urls.get(image));
    const url = URL.createObjectURL(blob);
    this.#urls.set(image, url);
    image.src = url;
  }
}
