/* One watching from its start to its end: a source gives frames, a stream takes them, a record keeps what comes back.
 * It joins the three and tells the page; it touches no element but the video that is seen. */

import { NetworkStream } from "./network.js";
import { Record } from "./record.js";
import { Camera, VideoFile, miniature } from "./source.js";
import { LiveStream } from "./stream.js";

const ROUND_TRIPS = 99; // the newest so many make the median
const MOST_STANDING = 16; // questions said again to a new stream, where the server names no other limit

export class Run {
  record = new Record();
  roundTrips = [];
  seen = 0;
  over = false;
  #asked = []; // all questions, in order
  #open = false;
  #serverDropped = 0;
  #scheduled;

  /**
   * Args:
   *   kind: "sample", "file", "camera" or "network".
   *   what: {view, url | device | address, fps, most (that the server takes), memory, threshold, asPlayed,
   *          mostStanding}.
   *   questions: asked with the first frame.
   *   scheduled: [{time, text}] in order, asked with the first frame at or after their time.
   *   page: {state(name, detail), event(index, event), frame(canvas), picture(blob) → drawable, asked(text, time),
   *          scheduled(text), note(time, text), counts(), error(message)}.
   */
  constructor(kind, what, questions, scheduled, page) {
    Object.assign(this, { kind, what, page });
    this.#asked = [...questions];
    this.#scheduled = [...scheduled];
    this.settings = { fps: what.fps, memory: what.memory, threshold: what.threshold };
    const sink = {
      room: () => (this.stream?.open ? this.stream.inFlight : null),
      frame: (time, jpeg, small, canvas) => this.#frame(time, jpeg, small, canvas),
      done: () => this.stream.finish(),
      lost: (error) => this.#lost(error),
    };
    if (kind === "camera") this.source = new Camera(what.view, what.fps, sink);
    if (kind === "file" || kind === "sample") {
      this.source = new VideoFile(what.view, what.url, what.fps, what.most, what.asPlayed, sink);
    }
  }

  /** Opens the source, then the stream. Throws SourceError where the source cannot be had. */
  async start() {
    this.page.state("opening");
    await this.source?.start(this.what.device);
    if (this.over) return;
    const standing = () => [...new Set(this.#asked)].slice(-(this.what.mostStanding ?? MOST_STANDING));
    const on = {
      state: (name, detail) => this.#state(name, detail),
      opened: (_, again) => this.#opened(again),
      event: (...told) => this.#event(...told),
      notice: (notice, time) => this.#notice(notice, time),
      picture: (blob) => this.#picture(blob),
      counts: (stream) => {
        this.#serverDropped = stream.dropped;
        this.page.counts();
      },
    };
    if (this.source) this.stream = new LiveStream(this.settings, standing, on);
    else this.stream = new NetworkStream(this.what.address, this.settings, standing, on);
  }

  /** Asks with the next frame. */
  ask(text) {
    this.#asked.push(text);
    this.stream?.ask(text);
  }

  set threshold(value) {
    this.settings.threshold = value;
    this.stream?.setThreshold(value);
  }

  /** Whether the stream is open now. */
  get watching() {
    return this.#open && !this.over;
  }

  get dropped() {
    return (this.source?.dropped ?? 0) + this.#serverDropped;
  }

  /** The median of the newest round trips in milliseconds, null before the first. */
  get median() {
    const sorted = [...this.roundTrips].sort((a, b) => a - b);
    return sorted.length ? sorted[sorted.length >> 1] : null;
  }

  stop() {
    if (this.over) return;
    if (this.stream) this.stream.stop();
    else this.#state("ended", { reason: "stopped" });
  }

  #state(name, detail = {}) {
    if (this.over) return;
    if (name === "ended" || name === "failed") {
      this.over = true;
      this.source?.stop();
    } else if (name === "open") this.#open = true;
    else if (this.#open) {
      this.#open = false;
      if (this.source) this.record.interrupt("not connected"); // a network stream goes on at the server meanwhile
    }
    this.page.state(name, detail);
  }

  #opened(again) {
    if (!again) return;
    this.record.interrupt("begun anew");
    this.source?.rewind(this.record.count ? this.record.end + 1 / this.what.fps : 0);
    const said = this.#asked.length ? "; the questions were asked again" : "";
    this.page.note(this.record.end, `Connected anew${said}. It remembers nothing of what came before.`);
  }

  #lost(error) {
    if (this.over) return;
    this.stream.stop(error.message);
    this.page.error(`${error.title}. ${error.message}`);
  }

  #frame(time, jpeg, small, canvas) {
    while (this.#scheduled.length && this.#scheduled[0].time <= time) {
      const { text } = this.#scheduled.shift();
      this.page.scheduled(text);
      this.ask(text);
    }
    if (!this.stream.send(time, jpeg)) return;
    this.record.expect(time, small);
    this.page.frame(canvas);
  }

  #event(event, line, time, roundTrip) {
    const index = this.record.add(event, line, time);
    this.seen += 1;
    this.roundTrips.push(roundTrip ?? event.latency_ms);
    if (this.roundTrips.length > ROUND_TRIPS) this.roundTrips.shift();
    this.source?.answered();
    this.page.event(index, event, time);
  }

  #notice(notice, time) {
    if (notice.type === "asked") this.page.asked(notice.text, time);
    else if (notice.type === "dropped") this.#serverDropped += 1;
    else if (notice.type === "gap") this.#gap(notice, time);
    else if (notice.type === "missed") this.page.note(time, `${notice.count} events came while nobody was connected.`);
    else if (notice.type === "error") this.page.error(notice.message);
    this.page.counts();
  }

  #gap(notice, time) {
    if (notice.seconds === null) {
      this.record.interrupt(notice.reason);
      this.page.note(time, `No picture: ${notice.reason}.`);
    } else this.page.note(time, `The picture is back after ${notice.seconds.toFixed(1)} s.`);
  }

  /** The newest picture of a network stream; a small copy of it belongs to the newest event. */
  async #picture(blob) {
    if (this.over) return;
    const drawn = await this.page.picture(blob);
    const index = this.record.count - 1;
    if (index < 0) return;
    this.record.picture(index, await miniature(drawn, drawn.naturalWidth, drawn.naturalHeight));
  }
}
