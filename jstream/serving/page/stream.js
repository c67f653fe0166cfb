/* A live stream over the WebSocket: sends frames and questions, tells of events, and opens a new stream where one was
 * lost. The server's times begin at 0 with each stream; everything told here is in the times of the page, which go
 * on. */

import { address, token } from "./api.js";
import { Patience } from "./patience.js";

const DEAD_AFTER = 30000; // ms without any word although frames wait: the connection is dead and nobody said so
// Close codes after which the same would only happen again.
const HOPELESS = { 1003: "the server did not understand", 1008: "the server refused", 1009: "a frame was too big" };
const SAME_TIME = 1e-3; // seconds; frames are farther apart

export class LiveStream {
  #socket = null;
  #base = null; // the page's time of this stream's first frame
  #waiting = []; // {time, sent} of frames without an answer, in order
  #heard = 0; // when the server last said something
  #greeted = false; // the message that opens a stream was sent
  #open = false;
  #over = false;
  #said = 0; // questions that the opening of this stream held
  #most = Infinity; // of them that an opening may hold, the newest
  #opened = 0; // how many streams were opened
  #error = ""; // the newest one of this socket
  #reason = ""; // why the server ended this stream

  /**
   * Args:
   *   settings: {fps, memory, threshold}; read anew for each stream that is opened.
   *   standing: () → the questions to be asked at the start of each stream.
   *   on: {state(name, detail), opened(info, again), event(event, line, time, roundTrip), notice(notice, time)}.
   */
  constructor(settings, standing, on) {
    Object.assign(this, { settings, standing, on });
    this.patience = new Patience((name, detail) => this.#over || on.state(name, detail));
    this.#run();
  }

  /** Whether frames are taken now. */
  get open() {
    return this.#open && !this.#over;
  }

  /** How many frames have no answer yet. */
  get inFlight() {
    return this.#waiting.length;
  }

  /** Sends a frame: `time` in seconds of the page, `jpeg` a Blob. Returns whether it went out. */
  send(time, jpeg) {
    if (!this.open) return false;
    this.#base ??= time;
    const head = new DataView(new ArrayBuffer(8));
    head.setFloat64(0, time - this.#base);
    this.#socket.send(new Blob([head.buffer, jpeg]));
    this.#waiting.push({ time, sent: performance.now() });
    if (this.#waiting.length === 1) this.#heard = performance.now();
    return true;
  }

  /** Asks with the next frame. Where no stream is open it is among the standing questions of the next one. */
  ask(text) {
    if (this.#greeted && !this.#over) this.#say({ type: "ask", text });
  }

  setThreshold(value) {
    if (this.#greeted && !this.#over) this.#say({ type: "threshold", value });
  }

  /** No more frames; all that wait are seen, then `state("ended")` is told. */
  finish() {
    if (this.open) this.#say({ type: "close" });
    else this.stop("closed");
  }

  /** Ends at once. */
  stop(reason = "stopped") {
    if (this.#over) return;
    this.#over = true;
    this.patience.hurry();
    this.#socket?.close(1000);
    this.on.state("ended", { reason });
  }

  /** Attempts again now. */
  hurry() {
    this.patience.hurry();
  }

  #say(message) {
    this.#socket.send(JSON.stringify(message));
  }

  async #run() {
    const watch = setInterval(() => this.#watch(), 1000);
    while (!this.#over) {
      this.on.state("connecting", { again: this.#opened > 0 });
      const closed = await this.#one();
      this.#open = this.#greeted = false;
      if (this.#over) break;
      if (closed.code === 1000 && closed.opened) {
        this.#over = true;
        this.on.state("ended", { reason: this.#reason || "closed" });
        break;
      }
      const message = closed.reason || this.#error || HOPELESS[closed.code] || "the connection was lost";
      if (closed.code in HOPELESS) {
        this.#fail(message);
        break;
      }
      const why = await this.patience.mend({ full: closed.code === 1013, message });
      if (why.kind === "failed" && !this.#over) this.#fail(why.message);
      // A server with free places refused the opening: the questions are more than it hears with one frame.
      if (why.kind === "ready" && !closed.opened && this.#error) this.#most = Math.max(1, this.#said >> 1);
    }
    clearInterval(watch);
  }

  #fail(message) {
    this.#over = true;
    this.on.state("failed", { message });
  }

  /** One socket from its opening to its end. Resolves to {code, reason, opened}. */
  #one() {
    this.#base = null;
    this.#waiting = [];
    this.#error = this.#reason = "";
    let opened = false;
    const protocols = token() ? ["jstream.v1", `bearer.${token()}`] : ["jstream.v1"];
    return new Promise((resolve) => {
      let socket;
      try {
        socket = new WebSocket(address("v1/live", "ws"), protocols);
      } catch {
        resolve({ code: 1006, reason: "the token holds characters that no token has", opened });
        return;
      }
      this.#socket = socket;
      socket.onopen = () => {
        this.#heard = performance.now();
        const queries = this.standing().slice(-this.#most);
        this.#said = queries.length;
        this.#say({ type: "open", ...this.settings, queries });
        this.#greeted = true;
      };
      socket.onmessage = ({ data }) => {
        this.#heard = performance.now();
        const message = JSON.parse(data);
        if (message.type === "opened") {
          opened = this.#open = true;
          this.patience.relieved();
          this.#opened += 1;
          this.on.state("open");
          this.on.opened(message, this.#opened > 1);
        } else if (message.type === undefined) this.#event(message, data);
        else this.#notice(message);
      };
      socket.onclose = ({ code, reason }) => resolve({ code, reason, opened });
    });
  }

  #event(event, line) {
    const frame = this.#answered(event.time);
    const roundTrip = frame === null ? null : performance.now() - frame.sent;
    this.on.event(event, line, event.time + (this.#base ?? 0), roundTrip);
  }

  #notice(notice) {
    if (notice.type === "error") this.#error = notice.message;
    if (notice.type === "ended") this.#reason = notice.reason;
    if (notice.time !== undefined && notice.type !== "asked") this.#answered(notice.time); // a frame that is not seen
    this.on.notice(notice, notice.time === undefined ? null : notice.time + (this.#base ?? 0));
  }

  /** Takes the frame of a time out of those that wait, with any before it. */
  #answered(time) {
    const page = time + (this.#base ?? 0);
    const which = this.#waiting.findIndex((frame) => Math.abs(frame.time - page) < SAME_TIME);
    return which < 0 ? null : this.#waiting.splice(0, which + 1)[which];
  }

  #watch() {
    if (this.open && this.#waiting.length && performance.now() - this.#heard > DEAD_AFTER) {
      this.#open = false;
      const dead = this.#socket;
      // A dead connection may take minutes to close, so its end is not waited for.
      dead.onclose({ code: 1006, reason: "the server has not answered for a while" });
      dead.onclose = dead.onmessage = null;
      dead.close();
    }
  }
}
