/* The timeline: the probabilities of the states stacked over time, replies as dots, questions as dashed lines, gaps
 * left empty. It draws what a Record holds, at most once a picture of the screen, and tells which moment was chosen. */

import { STATES, clock } from "./record.js";

const MARKERS = 24; // pixels, the strip of dots
const AXIS = 20;
const SIDE = 7; // left free on both sides, so that a dot at either end is whole
const DOT = 4.5;
const SHORTEST = 10; // seconds that are shown of a stream that has just begun
const NEAR = 14; // pixels from a dot that still mean it
const LONGEST_STAND = 3; // a frame stands until the next, but at most this many usual steps: a pause stays a gap
const TICK_EVERY = 90; // pixels, about
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800];

export class Timeline {
  record = null;
  threshold = null;
  fps = 1;
  duration = 0; // of a file, which is shown whole from the start
  playhead = null;
  #span = Infinity; // seconds shown; Infinity shows all
  #from = 0;
  #to = 1;
  #held = null; // the right edge, where someone looks back
  #chosen = null; // the time of the chosen moment
  #at = -1; // the reply that is chosen
  #hover = null; // pixels
  #width = 0; // of the canvas; asking for it lays the page out anew, so it is asked once a drawing
  #due = false;

  /**
   * Args:
   *   canvas: the drawing.
   *   slider: the element with role="slider" that holds it and has the focus.
   *   readout: where what stands under the pointer is told.
   *   jump: (time, index of the event) → goes there.
   */
  constructor(canvas, slider, readout, jump) {
    Object.assign(this, { canvas, slider, readout, jump });
    new ResizeObserver(() => this.draw()).observe(canvas);
    slider.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("click", (event) => this.#click(event));
    canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.#point(null));
  }

  show(record) {
    this.record = record;
    this.#chosen = this.#held = null;
    this.#at = -1;
    this.#tell();
    this.draw();
  }

  /** Shows the newest `seconds`, or everything. */
  zoom(seconds) {
    this.#span = seconds;
    this.#held = this.#chosen !== null && seconds < Infinity ? this.#chosen + seconds / 2 : null;
    this.draw();
  }

  /** Marks a moment as chosen; null follows the newest again. */
  choose(time) {
    this.#chosen = time;
    this.#at = time === null ? -1 : this.#reply(time);
    if (time === null) this.#held = null;
    else if (time < this.#from || time > this.#to) this.#held = time + this.#span / 2;
    this.#tell();
    this.draw();
  }

  draw() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      this.#draw();
    });
  }

  // ---------------------------------------------------------------------------------------------------------- choosing

  #key(event) {
    const replies = this.record?.replies ?? [];
    const last = replies.length - 1;
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 10, PageDown: -10 };
    let to;
    if (event.key === "Home") to = 0;
    else if (event.key === "End") to = last;
    else if (event.key in moves) {
      const at = this.#at >= 0 ? this.#at : moves[event.key] < 0 ? replies.length : -1;
      to = Math.min(last, Math.max(0, at + moves[event.key]));
    } else return;
    event.preventDefault();
    if (last >= 0) this.jump(replies[to].time, replies[to].index);
  }

  #click(event) {
    const { record } = this;
    if (!record?.count) return;
    const time = this.#time(event.offsetX);
    const reply = record.replies[this.#reply(time)];
    if (reply && Math.abs(this.#x(reply.time) - event.offsetX) <= NEAR) this.jump(reply.time, reply.index);
    else {
      const index = record.nearest(time);
      this.jump(record.time(index), index);
    }
  }

  /** The reply nearest to a time, −1 where nothing was said. */
  #reply(time) {
    const { replies } = this.record;
    let low = 0;
    let high = replies.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (replies[middle].time < time) low = middle + 1;
      else high = middle;
    }
    if (low === replies.length) return replies.length - 1;
    return low > 0 && time - replies[low - 1].time < replies[low].time - time ? low - 1 : low;
  }

  #tell() {
    const replies = this.record?.replies ?? [];
    const reply = replies[this.#at];
    this.slider.setAttribute("aria-valuemin", 0);
    this.slider.setAttribute("aria-valuemax", replies.length);
    this.slider.setAttribute("aria-valuenow", this.#at + 1);
    const none = replies.length ? `${replies.length} replies; arrow keys go from one to the next` : "nothing said yet";
    this.slider.setAttribute("aria-valuetext", reply ? `${clock(reply.time)}: ${reply.text}` : none);
  }

  /** A reply came: the number of them is part of what the slider says. */
  grown() {
    this.#tell();
    this.draw();
  }

  #point(x) {
    this.#hover = x;
    const { record } = this;
    if (x === null || !record?.count) this.readout.textContent = "";
    else {
      const index = record.nearest(this.#time(x));
      const probs = STATES.map((state, n) => `${state} ${record.prob(index, n).toFixed(2)}`);
      this.readout.textContent = `${clock(record.time(index))}  ${probs.join("  ")}`;
    }
    this.draw();
  }

  // ----------------------------------------------------------------------------------------------------------- drawing

  #x(time) {
    return SIDE + ((time - this.#from) / (this.#to - this.#from)) * (this.#width - 2 * SIDE);
  }

  #time(x) {
    return this.#from + ((x - SIDE) / Math.max(1, this.#width - 2 * SIDE)) * (this.#to - this.#from);
  }

  #view() {
    const end = Math.max(this.record?.end ?? 0, this.playhead ?? 0) + 1 / this.fps;
    if (this.#span === Infinity) [this.#from, this.#to] = [0, Math.max(end, this.duration || SHORTEST)];
    else {
      this.#to = Math.max(this.#held === null ? end : Math.min(this.#held, end), this.#span);
      this.#from = this.#to - this.#span;
    }
  }

  #draw() {
    const { canvas, record } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    this.#width = width;
    const scale = devicePixelRatio || 1;
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`);
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.#view();
    const [top, foot] = [MARKERS, height - AXIS];

    pen.fillStyle = colour("track");
    pen.fillRect(SIDE, top, width - 2 * SIDE, foot - top);
    if (record) this.#stack(pen, colour, width - SIDE, top, foot, scale);
    this.#axis(pen, colour, width, foot, style.fontFamily);
    if (!record) return;

    if (this.threshold !== null) {
      const y = foot - this.threshold * (foot - top);
      dashed(pen, colour("ink"), [SIDE, y, width - SIDE, y], [5, 4]);
    }
    for (const question of record.questions) {
      const x = this.#x(question.time);
      if (x >= -1 && x <= width + 1) dashed(pen, colour("query"), [x, MARKERS / 2 + 6, x, foot], [3, 3]);
      if (x >= -1 && x <= width + 1) diamond(pen, colour("query"), x, MARKERS / 2);
    }
    this.#dots(pen, colour, width);
    for (const [time, name] of [
      [this.playhead, "ink"],
      [this.#chosen, "accent"],
    ]) {
      if (time === null) continue;
      pen.fillStyle = colour(name);
      pen.fillRect(Math.round(this.#x(time)) - 1, MARKERS - 4, 2, foot - top + 4);
    }
    if (this.#hover !== null) {
      pen.fillStyle = colour("pale");
      pen.fillRect(Math.round(this.#hover), top, 1, foot - top);
    }
  }

  /** One column a pixel at most; of the frames in it the one nearest to speaking is drawn. */
  #stack(pen, colour, width, top, foot, scale) {
    const { record } = this;
    const usual = 1 / this.fps;
    const colours = STATES.map(colour);
    const tall = foot - top;
    const snap = (x) => Math.round(x * scale) / scale; // to whole pixels of the screen, or seams would show
    const last = Math.min(record.count, record.after(this.#to) + 1);
    let index = Math.max(0, record.after(this.#from - LONGEST_STAND * usual));
    while (index < last) {
      const left = snap(Math.max(SIDE, this.#x(record.time(index))));
      const pixel = Math.floor(left);
      let shown = index;
      let end = index;
      for (; end < last && (end === index || this.#x(record.time(end)) < pixel + 1); end += 1) {
        if (nearness(record, end) > nearness(record, shown)) shown = end;
      }
      const newest = record.time(end - 1);
      const next = end < record.count ? record.time(end) : newest + usual;
      const right = snap(Math.min(width, this.#x(Math.min(next, newest + LONGEST_STAND * usual))));
      if (right > left) {
        let y = foot;
        STATES.forEach((_, n) => {
          const part = record.prob(shown, n) * tall;
          pen.fillStyle = colours[n];
          pen.fillRect(left, y - part, right - left, part);
          y -= part;
        });
      }
      index = end;
    }
    pen.fillStyle = colour("gap");
    for (const gap of record.gaps) {
      const [left, right] = [this.#x(gap.from + usual), this.#x(gap.to ?? record.end + usual)];
      // A gap of no length (a file goes on where it was) is still one: what came before is forgotten.
      pen.fillRect(left, top, Math.max(2, right - left), tall);
    }
  }

  #dots(pen, colour, width) {
    const { record } = this;
    pen.fillStyle = colour("response");
    const y = MARKERS / 2;
    let before = -Infinity;
    record.replies.forEach((reply, n) => {
      const x = this.#x(reply.time);
      if (x < -DOT || x > width + DOT) return;
      if (reply.start !== null && reply.start < reply.time) {
        pen.globalAlpha = 0.3;
        pen.fillRect(this.#x(reply.start), y - 2, x - this.#x(reply.start), 4);
        pen.globalAlpha = 1;
      }
      if (x - before < 1 && n !== this.#at) return; // it would lie on the one before
      before = x;
      circle(pen, x, y, DOT);
    });
    const chosen = record.replies[this.#at];
    if (!chosen) return;
    pen.fillStyle = pen.strokeStyle = colour("accent");
    pen.lineWidth = 2;
    circle(pen, this.#x(chosen.time), y, DOT);
    pen.beginPath();
    pen.arc(this.#x(chosen.time), y, DOT + 3, 0, 2 * Math.PI);
    pen.stroke();
  }

  #axis(pen, colour, width, foot, font) {
    const span = this.#to - this.#from;
    const step = STEPS.find((s) => (s / span) * width >= TICK_EVERY * 0.7) ?? STEPS.at(-1);
    pen.font = `11px ${font}`;
    pen.textBaseline = "top";
    for (let tick = Math.ceil(this.#from / step) * step; tick <= this.#to; tick += step) {
      const x = this.#x(tick);
      pen.fillStyle = colour("pale");
      pen.fillRect(Math.min(width - 1, Math.round(x)), foot, 1, 4);
      const text = clock(tick);
      const half = pen.measureText(text).width / 2;
      pen.fillText(text, Math.min(width - 2 * half, Math.max(0, x - half)), foot + 7);
    }
  }
}

function nearness(record, index) {
  return (record.state(index) === "response" ? 2 : 0) + record.prob(index, 0) + record.prob(index, 1) / 2;
}

function circle(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}

function diamond(pen, colour, x, y) {
  pen.fillStyle = colour;
  pen.beginPath();
  pen.moveTo(x, y - 5);
  pen.lineTo(x + 5, y);
  pen.lineTo(x, y + 5);
  pen.lineTo(x - 5, y);
  pen.fill();
}

function dashed(pen, colour, [x0, y0, x1, y1], pattern) {
  pen.save();
  pen.strokeStyle = colour;
  pen.lineWidth = 1;
  pen.setLineDash(pattern);
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
  pen.restore();
}
