/* Where the browser's own pictures come from: a camera, captured at every tick, and a video file, sampled at exact
 * times. Both hand over (time, jpeg, small picture) and know nothing of streams but whether there is room for a
 * frame. */

const LONGEST_SIDE = 640; // pixels of what is sent
const QUALITY = 0.85; // of JPEG
const SMALL_SIDE = 320; // pixels of what is kept
const SMALL_QUALITY = 0.6;
const CAMERA_IN_FLIGHT = 2; // with as many frames unanswered a tick is passed over
const FILE_IN_FLIGHT = 4;
const OF_THE_MOST = 0.9; // a file goes at most so much of the rate that the server takes, as its frames may bunch up
const INSIDE = 1e-3; // seconds behind a frame's time, so that rounding does not show the frame before
const UNSHOWN = 500; // milliseconds that a picture may take to be shown once the video has gone to it

/** What keeps a picture from coming; `title` in few words, `message` says what to do. */
export class SourceError extends Error {
  constructor(title, message) {
    super(message);
    this.title = title;
  }
}

/** Turns pictures of a video element into JPEGs. */
class Grabber {
  #large = document.createElement("canvas");

  /** Returns [jpeg, small jpeg, canvas] of what the element shows, or null before it shows anything. */
  async grab(video) {
    const [width, height] = [video.videoWidth, video.videoHeight];
    if (!width || !height) return null;
    draw(this.#large, video, width, height, LONGEST_SIDE);
    const small = miniature(this.#large, width, height);
    return [await encode(this.#large, QUALITY), await small, this.#large];
  }
}

/** A picture of some width and height as a JPEG of the size that is kept. */
export function miniature(picture, width, height) {
  const canvas = document.createElement("canvas");
  draw(canvas, picture, width, height, SMALL_SIDE);
  return encode(canvas, SMALL_QUALITY);
}

function draw(canvas, picture, width, height, longest) {
  const scale = Math.min(1, longest / Math.max(width, height));
  const [w, h] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  canvas.getContext("2d").drawImage(picture, 0, 0, w, h);
}

function encode(canvas, quality) {
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no JPEG came out"))), "image/jpeg", quality),
  );
}

// ------------------------------------------------------------------------------------------------------------- camera

export class Camera {
  dropped = 0;
  #grabber = new Grabber();
  #began = null; // performance.now() of the first frame
  #timer = 0;
  #awake = null;
  #stream = null;
  #over = false;

  /**
   * Args:
   *   view: the <video> that shows it.
   *   fps: frames a second.
   *   sink: {room() → frames unanswered, or null where no stream is open; frame(time, jpeg, small, canvas);
   *          lost(error)}.
   */
  constructor(view, fps, sink) {
    Object.assign(this, { view, fps, sink });
  }

  /** Asks for the camera. `which` is "user", "environment" or a device id. Throws SourceError. */
  async start(which) {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new SourceError(
        "The camera needs a safe connection",
        "Browsers hand out the camera only over https or on localhost. Start the server with --certificate and --key, " +
          "or open the page on the machine that it runs on.",
      );
    }
    const facing = which === "user" || which === "environment";
    const wanted = facing ? { facingMode: which } : { deviceId: { exact: which } };
    const size = { width: { ideal: 1280 }, height: { ideal: 720 } };
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { ...wanted, ...size }, audio: false });
    } catch (error) {
      throw cameraError(error);
    }
    if (this.#over) {
      for (const track of stream.getTracks()) track.stop();
      return;
    }
    this.#release();
    this.#stream = stream;
    stream.getVideoTracks()[0].onended = () =>
      this.sink.lost(new SourceError("The camera is gone", "It was unplugged, or another program took it."));
    this.view.srcObject = stream;
    await this.view.play().catch(() => {}); // it plays by itself otherwise
    this.device = stream.getVideoTracks()[0].getSettings().deviceId;
    if (this.#timer) return;
    this.#awake = navigator.wakeLock?.request("screen").catch(() => null); // a phone that sleeps takes its camera along
    this.#tick(performance.now());
  }

  /** The cameras there are, [{id, label}]; their labels are known once one was allowed. */
  static async list() {
    const devices = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
    return devices
      .filter((d) => d.kind === "videoinput" && d.deviceId)
      .map((d) => ({ id: d.deviceId, label: d.label }));
  }

  answered() {} // ticks come by the clock

  rewind() {} // what was not seen is gone

  stop() {
    this.#over = true;
    clearTimeout(this.#timer);
    this.#release();
    this.#awake?.then((lock) => lock?.release());
    this.view.srcObject = null;
  }

  #release() {
    for (const track of this.#stream?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
  }

  #tick(due) {
    const next = Math.max(due + 1000 / this.fps, performance.now());
    this.#timer = setTimeout(() => this.#tick(next), next - performance.now());
    this.#capture().catch((error) => this.sink.lost(new SourceError("The picture could not be read", error.message)));
  }

  async #capture() {
    const unanswered = this.sink.room();
    if (unanswered === null || this.view.readyState < 2) return;
    if (unanswered >= CAMERA_IN_FLIGHT) {
      this.dropped += 1;
      return;
    }
    const now = performance.now();
    const grabbed = await this.#grabber.grab(this.view);
    if (!grabbed || this.#over) return;
    this.#began ??= now;
    this.sink.frame((now - this.#began) / 1000, ...grabbed);
  }
}

function cameraError(error) {
  const texts = {
    NotAllowedError: [
      "The camera was refused",
      "Allow it for this page (the camera sign beside the address, or the settings of the browser), then try again.",
    ],
    NotFoundError: ["There is no camera", "Plug one in, or take a video file, the sample clip or a network stream."],
    NotReadableError: ["The camera is busy", "Another program holds it. Close that program, then try again."],
    OverconstrainedError: ["That camera is not there", "Choose another one, then try again."],
  };
  return new SourceError(...(texts[error.name] ?? ["The camera could not be opened", error.message]));
}

// --------------------------------------------------------------------------------------------------------- video files

export class VideoFile {
  dropped = 0; // of a file nothing is dropped
  paused = false;
  #grabber = new Grabber();
  #sampler = document.createElement("video");
  #next = 0; // the number of the next frame
  #held = 0; // where the seen video was paused
  #soonest = 0; // performance.now() before which it does not go out
  #over = false;
  #wake = null;

  /**
   * Samples a video in an element of its own, so that the one that is seen can be paused and looked back in.
   *
   * Args:
   *   view: the <video> that shows it.
   *   url: of the video.
   *   fps: frames a second; frame n is the picture at n / fps.
   *   most: frames a second that the server takes.
   *   asPlayed: whether to go no faster than the video is played.
   *   sink: as of Camera, and done() after the last frame.
   */
  constructor(view, url, fps, most, asPlayed, sink) {
    Object.assign(this, { view, url, fps, most, asPlayed, sink });
    Object.assign(this.#sampler, { muted: true, playsInline: true, preload: "auto" });
  }

  get duration() {
    return this.#sampler.duration;
  }

  /** Opens the video and begins. Throws SourceError. */
  async start() {
    const sampler = this.#sampler;
    sampler.src = this.url;
    sampler.play().then(
      () => sampler.pause(),
      () => {},
    ); // some phones decode nothing before play() within a click
    this.view.controls = false;
    if (this.view.getAttribute("src") !== this.url) this.view.src = this.url;
    this.view.currentTime = 0;
    await happens(sampler, "loadeddata", () => sampler.readyState >= 2);
    sampler.pause();
    if (!sampler.videoWidth) throw unplayable();
    if (!Number.isFinite(sampler.duration)) {
      sampler.currentTime = 1e9; // recordings of browsers say how long they are only once they were read to the end
      await happens(sampler, "durationchange", () => Number.isFinite(sampler.duration));
    }
    this.view.ontimeupdate = () => this.answered();
    if (!this.#over) this.#pump().catch((error) => this.#over || this.sink.lost(asSourceError(error)));
  }

  /** Something changed: an answer came, or the video went on. */
  answered() {
    this.#wake?.();
  }

  /** Holds the video, and with it the stream; the model sees the next frame when it goes on. */
  pause(paused) {
    this.paused = paused;
    if (paused) {
      this.view.pause();
      this.#held = this.view.currentTime;
    } else this.view.currentTime = this.#held; // someone may have looked back meanwhile
    this.answered();
  }

  /** Goes back to the frame at a time: frames sent since then were lost with their stream. */
  rewind(time) {
    this.#next = Math.min(this.#next, Math.round(time * this.fps));
  }

  stop() {
    this.#over = true;
    this.answered();
    this.view.ontimeupdate = null;
    this.view.pause();
    this.#sampler.removeAttribute("src");
    this.#sampler.load();
  }

  async #pump() {
    while (!this.#over) {
      const time = this.#next / this.fps;
      if (time >= this.duration) break;
      if (!this.#mayTake(time)) {
        await this.#change();
        continue;
      }
      const number = this.#next;
      this.#next += 1;
      await this.#seek(time + INSIDE);
      const grabbed = await this.#grabber.grab(this.#sampler);
      if (this.#over || !grabbed) return;
      if (this.#next !== number + 1) continue; // rewound meanwhile
      if (this.sink.room() === null) this.rewind(time);
      else this.sink.frame(time, ...grabbed);
      this.#soonest = performance.now() + 1000 / (OF_THE_MOST * this.most);
    }
    if (this.#over) return;
    if (this.asPlayed) while (!this.view.ended && !this.#over && (await this.#playOn())) await this.#change();
    if (!this.#over) this.sink.done();
  }

  /** Whether the frame at `time` may go out now; keeps the seen video from running ahead of the model. */
  #mayTake(time) {
    const unanswered = this.sink.room();
    const early = performance.now() < this.#soonest;
    const room = unanswered !== null && unanswered < FILE_IN_FLIGHT && !this.paused && !early;
    if (!this.asPlayed) return room;
    const reached = this.view.currentTime >= time || this.view.ended;
    const ahead = this.view.currentTime - time;
    if (!room && (unanswered === null || ahead > 1 / this.fps)) this.view.pause();
    else if (!this.paused) this.#playOn();
    return room && reached;
  }

  async #playOn() {
    if (this.view.paused && !this.view.ended && !this.paused) await this.view.play().catch(() => {});
    return true;
  }

  /** Resolves when something may have changed. */
  #change() {
    return new Promise((resolve) => {
      const early = this.#soonest - performance.now();
      const timer = setTimeout(resolve, early > 0 ? Math.min(early, 50) : 50);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  async #seek(time) {
    const sampler = this.#sampler;
    const shown = presented(sampler);
    sampler.currentTime = Math.min(time, this.duration);
    await happens(sampler, "seeked", () => !sampler.seeking && sampler.readyState >= 2);
    // On a busy machine a seek ends before its picture is there. A page in the background is shown none.
    if (shown && !document.hidden) await Promise.race([shown, new Promise((resolve) => setTimeout(resolve, UNSHOWN))]);
  }
}

/** Resolves with the next picture that a video shows; null where the browser does not tell. */
function presented(video) {
  if (!video.requestVideoFrameCallback) return null;
  return new Promise((resolve) => video.requestVideoFrameCallback(resolve));
}

/** Resolves once `holds()` does, looking at each `type` event. Throws SourceError where the video cannot be read. */
function happens(video, type, holds) {
  return new Promise((resolve, reject) => {
    const look = () => {
      if (video.error) finish(reject, unplayable(video.error));
      else if (holds()) finish(resolve);
    };
    const finish = (settle, value) => {
      for (const name of [type, "error", "canplay"]) video.removeEventListener(name, look);
      settle(value);
    };
    for (const name of [type, "error", "canplay"]) video.addEventListener(name, look);
    look();
  });
}

function unplayable(error) {
  const network = error?.code === 2;
  if (network) return new SourceError("The video could not be loaded", "The connection was lost. Try again.");
  return new SourceError(
    "This browser cannot play the video",
    "Take an MP4 with H.264 or a WebM, or give the file to python -m jstream.stream --video=FILE, which reads more.",
  );
}

function asSourceError(error) {
  return error instanceof SourceError ? error : new SourceError("The video could not be read", error.message);
}
