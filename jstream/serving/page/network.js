/* A stream that the server itself fetches (rtsp://, http://): created over REST, heard as server-sent events, looked
 * at as snapshots. The events are read through fetch, since EventSource sends no Authorization header. */

import { Refusal, call } from "./api.js";
import { Patience } from "./patience.js";

const PICTURE_EVERY = 1000; // ms
const COUNTS_EVERY = 3000;
const HEARD_AT_LEAST = 40000; // ms; the server sends a comment every 15 s, so the connection is dead by then
const TRY_LATER = [429, 502, 503, 504];

export class NetworkStream {
  #id = null;
  #last = 0; // the id of the newest event
  #base = 0;
  #born = performance.now();
  #created = 0;
  #said = 0; // questions that the stream began with
  #most = Infinity; // of them that a stream may begin with, the newest
  #over = false;
  #reading = null; // AbortController of the events

  /**
   * Args:
   *   source: rtsp:// or http(s):// address.
   *   settings, standing, on: as of LiveStream; `on.picture(blob)` and `on.counts(stream object)` come on top.
   */
  constructor(source, settings, standing, on) {
    Object.assign(this, { source, settings, standing, on });
    this.patience = new Patience((name, detail) => this.#over || on.state(name, detail));
    this.#run();
    this.#every(PICTURE_EVERY, async () => on.picture(await (await call(`${this.#path}/snapshot.jpg`)).blob()));
    this.#every(COUNTS_EVERY, async () => on.counts(await (await call(this.#path)).json()));
  }

  get open() {
    return this.#id !== null && !this.#over;
  }

  get #path() {
    return `v1/streams/${this.#id}`;
  }

  ask(text) {
    if (this.open) this.#change(`${this.#path}/queries`, { method: "POST", json: { text } });
  }

  setThreshold(threshold) {
    if (this.open) this.#change(this.#path, { method: "PATCH", json: { threshold } });
  }

  /** Ends the stream at the server too; also while the page is being left. */
  stop(reason = "stopped") {
    if (this.#over) return;
    this.#over = true;
    this.patience.hurry();
    this.#reading?.abort();
    if (this.#id !== null) call(this.#path, { method: "DELETE", keepalive: true }).catch(() => {});
    this.on.state("ended", { reason });
  }

  hurry() {
    this.patience.hurry();
  }

  async #change(path, options) {
    try {
      await call(path, options);
    } catch (error) {
      this.on.notice({ type: "error", message: error.message }, null);
    }
  }

  async #run() {
    this.on.state("connecting", { again: false });
    while (!this.#over) {
      try {
        if (this.#id === null) await this.#create();
        await this.#read();
        continue; // the server closed the answer without an end: go on behind the newest event
      } catch (error) {
        if (this.#over) return;
        const lost = error instanceof Refusal && error.status === 404;
        if (lost)
          this.#id = null; // the server has begun anew and knows nothing of the stream
        else if (error instanceof Refusal && error.status !== 401 && !TRY_LATER.includes(error.status)) {
          this.#over = true;
          this.on.state("failed", { message: error.message });
          return;
        }
        const full = error instanceof Refusal && error.status === 429;
        const message = error instanceof Refusal ? error.message : "the connection was lost";
        const why = await this.patience.mend({ full, message });
        if (why.kind === "failed" && !this.#over) {
          this.#over = true;
          this.on.state("failed", { message: why.message });
        }
        // A server with free places refused: the questions are more than it hears with one frame.
        if (full && why.kind === "ready") this.#most = Math.max(1, this.#said >> 1);
      }
    }
  }

  async #create() {
    const queries = this.standing().slice(-this.#most);
    this.#said = queries.length;
    const before = this.standing();
    const again = this.#created > 0;
    const answer = await call("v1/streams", {
      method: "POST",
      json: { source: this.source, queries, ...this.settings },
    });
    const stream = await answer.json();
    if (this.#over) {
      call(`v1/streams/${stream.id}`, { method: "DELETE" }).catch(() => {});
      return;
    }
    this.#base = again ? (performance.now() - this.#born) / 1000 : 0;
    if (!again) this.#born = performance.now();
    this.#created += 1;
    this.#last = 0;
    this.#id = stream.id;
    this.on.opened(stream, again);
    for (const text of this.standing()) if (!before.includes(text)) this.ask(text); // asked meanwhile
  }

  /** Reads events until the connection ends; what was read last is where the next reading goes on. */
  async #read() {
    this.#reading = new AbortController();
    const headers = this.#last ? { "Last-Event-ID": String(this.#last) } : {};
    let pulse = 0;
    const alive = () => {
      clearTimeout(pulse);
      pulse = setTimeout(() => this.#reading.abort(), HEARD_AT_LEAST);
    };
    try {
      alive();
      const answer = await call(`${this.#path}/events`, { headers, signal: this.#reading.signal });
      this.on.state("open");
      let rest = "";
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new TypeError("the events ended");
        alive();
        const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) this.#message(block);
        if (this.#over) return;
      }
    } finally {
      clearTimeout(pulse);
    }
  }

  #message(block) {
    let type = "message";
    const data = [];
    for (const line of block.split("\n")) {
      const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
      if (field === "data") data.push(value);
      if (field === "event") type = value;
      if (field === "id") this.#last = Number(value);
    }
    if (!data.length) return;
    this.patience.relieved();
    const told = JSON.parse(data.join("\n"));
    const time = told.time === undefined ? null : told.time + this.#base;
    if (type === "message") this.on.event(told, data.join("\n"), time, null);
    else if (type === "ended") {
      this.#over = true;
      this.on.state("ended", { reason: told.reason });
    } else this.on.notice({ ...told, type }, time);
  }

  async #every(wait, look) {
    while (!this.#over) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      if (!this.open || document.hidden) continue;
      await look().catch(() => {}); // the events tell what is wrong, and no picture yet is nothing wrong
    }
  }
}
