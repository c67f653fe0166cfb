/* What one run of the page has heard: every event in compact arrays, its line as it came, replies, questions, gaps,
 * and small pictures of the moments, bounded. It draws nothing and asks nothing. */

export const STATES = ["response", "standby", "silence"]; // in the order they are stacked, from the foot
const READING_SPEED = 15; // characters a second; this and the next are those of captions.vtt
const SHORTEST_CAPTION = 2; // seconds
const LONGEST_CAPTION = 20;
const MOST_PICTURES = 2000; // of about 8 kB each

export class Record {
  count = 0;
  lines = []; // the events as they came, to be saved
  replies = []; // {index, time, text, start}
  questions = []; // {time, text}
  gaps = []; // {from, to (null: not over), reason}
  #times = new Float64Array(1024);
  #probs = new Float32Array(3 * 1024);
  #states = new Uint8Array(1024);
  #pictures = new Map(); // index → Blob
  #kept = 1; // of the silent frames, every how many-eth keeps its picture
  #expected = new Map(); // time → Blob, until its event comes

  /** Adds an event at `time` of the page; `line` is its JSON as received. Returns its index. */
  add(event, line, time) {
    if (this.count === this.#times.length) this.#grow();
    const index = this.count;
    this.#times[index] = time;
    STATES.forEach((state, n) => (this.#probs[3 * index + n] = event.probs[state] ?? 0));
    this.#states[index] = STATES.indexOf(event.state);
    this.lines.push(line);
    this.count += 1;
    const open = this.gaps.at(-1);
    if (open && open.to === null) open.to = time;
    if (event.text) {
      const start = event.start === null ? null : event.start + time - event.time;
      this.replies.push({ index, time, text: event.text, start });
    }
    this.#settle(index, time);
    return index;
  }

  time(index) {
    return this.#times[index];
  }

  prob(index, state) {
    return this.#probs[3 * index + state];
  }

  state(index) {
    return STATES[this.#states[index]] ?? "";
  }

  /** The time of the newest event, 0 before the first. */
  get end() {
    return this.count ? this.#times[this.count - 1] : 0;
  }

  /** The index of the first event at or after a time; `count` where there is none. */
  after(time) {
    let low = 0;
    let high = this.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#times[middle] < time) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** The index of the event nearest to a time, −1 where there is none. */
  nearest(time) {
    const after = this.after(time);
    if (after === this.count) return this.count - 1;
    return after > 0 && time - this.#times[after - 1] < this.#times[after] - time ? after - 1 : after;
  }

  /** Which reply stands under the picture at a time: from its event until it is read or the next one comes. */
  captionAt(time) {
    let low = 0;
    let high = this.replies.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.replies[middle].time <= time) low = middle + 1;
      else high = middle;
    }
    const reply = this.replies[low - 1];
    return reply && time < reply.time + readingTime(reply.text) ? reply : null;
  }

  /** A picture of a moment, given before its event comes. */
  expect(time, picture) {
    this.#expected.set(time, picture);
    if (this.#expected.size > 64) this.#expected.delete(this.#expected.keys().next().value); // lost with its stream
  }

  /** A picture for an event that is here already. */
  picture(index, blob) {
    this.#pictures.set(index, blob);
    if (this.#pictures.size > MOST_PICTURES) this.#thin();
  }

  /** The kept picture nearest to an event: {blob, time}, or null. */
  pictureAt(index) {
    for (let away = 0; away < this.count; away += 1) {
      for (const n of [index - away, index + away]) {
        if (this.#pictures.has(n)) return { blob: this.#pictures.get(n), time: this.#times[n] };
      }
    }
    return null;
  }

  /** The stream is interrupted from here on, until the next event. */
  interrupt(reason) {
    if (this.count && this.gaps.at(-1)?.to !== null) this.gaps.push({ from: this.end, to: null, reason });
  }

  #settle(index, time) {
    const near = [...this.#expected.keys()].find((key) => Math.abs(key - time) < 1e-3);
    if (near === undefined) return;
    const blob = this.#expected.get(near);
    this.#expected.delete(near);
    if (index % this.#kept === 0 || this.replies.at(-1)?.index === index) this.picture(index, blob);
  }

  /** Drops every second picture of those moments in which nothing was said, and the oldest where that is not enough. */
  #thin() {
    this.#kept *= 2;
    const said = new Set(this.replies.map((reply) => reply.index));
    for (const index of this.#pictures.keys()) {
      if (index % this.#kept && !said.has(index)) this.#pictures.delete(index);
    }
    for (const index of this.#pictures.keys()) {
      if (this.#pictures.size <= (3 * MOST_PICTURES) / 4) break;
      this.#pictures.delete(index);
    }
  }

  #grow() {
    this.#times = doubled(this.#times);
    this.#probs = doubled(this.#probs);
    this.#states = doubled(this.#states);
  }
}

function doubled(array) {
  const larger = new array.constructor(2 * array.length);
  larger.set(array);
  return larger;
}

/** How long a text stands under the picture, in seconds. */
export function readingTime(text) {
  return Math.min(Math.max(SHORTEST_CAPTION, [...text].length / READING_SPEED), LONGEST_CAPTION);
}

/** `0:07`, `1:02`, `1:00:02`. */
export function clock(time) {
  const whole = Math.max(0, Math.floor(time + 1e-6));
  const [hours, minutes, seconds] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(seconds)}` : `${minutes}:${two(seconds)}`;
}
