/* The page: joins what is on it to a Run, which does the watching. Everything a reader can press is wired here; how
 * frames travel and what is kept of them is not known here. */

import { call, diagnose, server, setToken, takeTokenFromAddress, token } from "./api.js";
import { captionsVtt, eventsJsonl, save, transcriptTxt } from "./files.js";
import { Questions } from "./questions.js";
import { Record, clock } from "./record.js";
import { Run } from "./run.js";
import { Settings } from "./settings.js";
import { Camera, SourceError } from "./source.js";
import { Stage } from "./stage.js";
import { Timeline } from "./timeline.js";
import { Transcript } from "./transcript.js";

const byId = (id) => document.getElementById(id);
const SAMPLE = "page/sample.mp4";
const LOOK_AGAIN = 1000; // ms, at a server that loads its model
const LOOK_SELDOM = 10000; // at one that is ready

let about = null; // what the server tells of itself
let run = null;
let file = null; // object URL of the chosen video
const kind = () => document.querySelector("[name=source]:checked").value;
const recorded = () => run?.kind === "file" || run?.kind === "sample";

const stage = new Stage();
const settings = new Settings((threshold) => {
  timeline.threshold = threshold;
  timeline.draw();
  if (run && !run.over) run.threshold = threshold;
});
const timeline = new Timeline(byId("timeline"), byId("slider"), byId("readout"), (time, index) => jump(time, index));
const transcript = new Transcript(byId("log"), byId("newest"), (time) => jump(time));
const questions = new Questions(transcript, (text) => {
  if (!run || run.over) return false;
  questions.expect(text);
  run.ask(text);
  return true;
});

// --------------------------------------------------------------------------------------------------- start and stop

async function start() {
  if (run && !run.over) return;
  const watched = kind();
  if (watched === "file" && !file) return byId("file").click();
  clear();
  let scheduled = [];
  if (watched === "sample") scheduled = await sampleQuestions();
  const first = scheduled.filter(({ time }) => time <= 0).map(({ text }) => text);
  const asked = [...new Set([...questions.atStart, ...first])];
  for (const text of asked) questions.expect(text);
  questions.waiting(false);

  const what = {
    view: stage.view,
    url: watched === "sample" ? new URL(SAMPLE, document.baseURI).href : file,
    device: byId("camera").value,
    address: byId("address").value.trim(),
    fps: settings.fps,
    most: about?.limits?.fps ?? settings.fps,
    memory: settings.memory,
    threshold: settings.threshold,
    asPlayed: settings.asPlayed,
    mostStanding: about?.limits?.queries,
  };
  run = new Run(
    watched,
    what,
    asked,
    scheduled.filter(({ time }) => time > 0),
    page,
  );
  stage.show(watched === "network" ? "snapshot" : watched === "camera" || what.asPlayed ? "view" : "still");
  Object.assign(timeline, { fps: what.fps, duration: 0, threshold: settings.threshold });
  timeline.show(run.record);
  byId("latency_name").textContent = watched === "network" ? "Model" : "Round trip";
  byId("sources").disabled = true;
  buttons();
  const mine = run;
  try {
    await mine.start();
    if (recorded()) timeline.duration = mine.source.duration;
    if (watched === "camera") await listCameras();
  } catch (error) {
    if (mine === run) refused(error);
  }
  buttons();
}

async function sampleQuestions() {
  try {
    const { queries } = await (await call("page/sample.json")).json();
    const told = queries.map((query) => /^([\d.]+):(.*)$/s.exec(query)).filter(Boolean);
    return told.map(([, time, text]) => ({ time: Number(time), text })).sort((a, b) => a.time - b.time);
  } catch {
    return []; // the clip runs without its questions, too
  }
}

/** The source could not be had: says why, and what to do. */
function refused(error) {
  const known = error instanceof SourceError;
  run.stop();
  run = null;
  questions.forget();
  transcript.clear();
  byId("empty").hidden = false;
  timeline.show(null);
  byId("sources").disabled = false;
  questions.waiting(true);
  light("bad", known ? error.title : "It could not be started");
  stage.veil({
    title: known ? error.title : "It could not be started",
    text: error.message,
    button: kind() === "file" ? "Choose another video" : "Try again",
    press: () => (kind() === "file" ? byId("file").click() : start()),
  });
}

function clear() {
  questions.forget();
  transcript.clear();
  stage.clear();
  page.error("");
  byId("empty").hidden = true;
  for (const id of ["seen", "said", "dropped"]) byId(id).textContent = "0";
  byId("latency").textContent = "–";
  byId("latency_new").textContent = byId("clock").textContent = "";
  timeline.playhead = null;
}

/** Back to the choice of what to watch; what was received stays until the next start. */
function reset() {
  byId("sources").disabled = false;
  stage.source(kind());
  stage.peek(null);
  stage.caption("");
  stage.show("view");
  stage.view.controls = false;
  if (kind() === "sample") {
    if (!stage.view.src.endsWith(SAMPLE)) stage.view.src = SAMPLE;
  } else (stage.view.removeAttribute("src"), stage.view.load());
  if (kind() === "camera") listCameras();
  stage.idle();
  light("idle", "Ready");
  if (run?.over) byId("clock").textContent = "";
  questions.waiting(true);
  networkAllowed();
  byId("again").hidden = true;
}

function buttons() {
  const going = run !== null && !run.over;
  byId("stop").hidden = !going;
  byId("pause").hidden = !recorded() || !(run.watching || run.source.paused) || !going;
  byId("pause").textContent = run?.source?.paused ? "Go on" : "Pause";
  byId("again").hidden = going || run === null;
  byId("camera_live").hidden = !going || run.kind !== "camera" || byId("camera_live").options.length < 2;
  const nothing = !run?.record.count;
  for (const id of ["save_events", "save_captions", "save_transcript"]) byId(id).disabled = nothing;
}

// ------------------------------------------------------------------------------------------- what a run tells the page

const page = {
  state(name, detail = {}) {
    const inSeconds = `Trying again in ${detail.seconds} s.`;
    const hurry = { button: "Try now", press: () => run.stream.hurry(), counting: true };
    if (name === "opening") {
      const asking = run?.kind === "camera" || kind() === "camera";
      light("busy", "Opening");
      stage.veil({
        title: asking ? "Your browser asks for the camera" : "Opening",
        text: asking ? "Please allow it." : "",
        spinner: true,
      });
    } else if (name === "connecting") {
      light("busy", detail.again ? "Connecting again" : "Connecting");
      stage.veil({ title: detail.again ? "Connecting again…" : "Connecting…", spinner: true });
    } else if (name === "loading") {
      light("busy", "The model is loading");
      stage.veil({
        title: "The model is loading",
        text: loadingText(detail),
        spinner: true,
        done: detail.done,
        total: detail.total,
        counting: true,
      });
    } else if (name === "full") {
      light("busy", "The server is full");
      const places = detail.places ? `All ${detail.places} places are taken. ` : "";
      stage.veil({ title: "The server is full", text: places + inSeconds, ...hurry });
    } else if (name === "reconnecting") {
      light("bad", "Not connected");
      stage.veil({ title: "Not connected", text: `${sentence(detail.message)} ${inSeconds}`, spinner: true, ...hurry });
    } else if (name === "denied") {
      light("bad", "A token is needed");
      stage.veil({ title: "The server asks for its token", button: "Enter the token", press: () => askForToken() });
      askForToken();
    } else if (name === "open") {
      light("live", "Watching");
      stage.veil(null);
    } else if (name === "ended") {
      light("idle", detail.reason === "closed" || detail.reason === "stopped" ? "Ended" : `Ended: ${detail.reason}`);
      finished();
    } else if (name === "failed") {
      light("bad", "Ended");
      finished();
      if (run.record.count) page.error(detail.message);
      else
        stage.veil({
          title: "It cannot be watched",
          text: sentence(detail.message),
          button: "Change something",
          press: reset,
        });
    }
    buttons();
  },

  event(index, event, time) {
    if (event.text) {
      transcript.reply(run.record.replies.at(-1));
      byId("said").textContent = run.record.replies.length;
      if (followsVideo()) caption();
      else stage.say(event.text);
      timeline.grown();
    } else timeline.draw();
    byId("clock").textContent =
      time >= 0 && run.source?.duration ? `${clock(time)} / ${clock(run.source.duration)}` : clock(time);
    page.counts();
    if (index === 0) buttons();
  },

  frame: (canvas) => stage.frame(canvas),
  picture: (blob) => stage.snapshot(blob),
  scheduled: (text) => questions.expect(text),

  asked(text, time) {
    if (!questions.heard(text, time)) return;
    run.record.questions.push({ time, text });
    timeline.draw();
  },

  note: (time, text) => transcript.note(time, text),

  counts() {
    byId("seen").textContent = run.seen.toLocaleString("en");
    byId("dropped").textContent = run.dropped.toLocaleString("en");
    if (run.median === null) return;
    byId("latency").textContent = `${milliseconds(run.median)} ms`;
    byId("latency_new").textContent = `newest ${milliseconds(run.roundTrips.at(-1))} ms`;
  },

  error(message) {
    byId("error").hidden = !message;
    byId("error").firstElementChild.textContent = message ? sentence(message) : "";
  },
};

function finished() {
  stage.veil(null);
  byId("sources").disabled = false;
  if (recorded()) {
    stage.show("view");
    stage.view.controls = true;
    stage.say("");
  }
  if (run?.kind === "camera") stage.show("still");
  timeline.draw();
}

function light(state, text) {
  byId("light").dataset.state = state;
  if (byId("state").textContent !== text) byId("state").textContent = text;
}

function loadingText({ stage: doing, done, total }) {
  return `${sentence(doing ?? "reading")} ${total ? `${done} of ${total}` : ""}`.trim();
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(whole) ? whole : `${whole}.`;
}

const milliseconds = (value) => (value < 9.95 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

// ------------------------------------------------------------------------------------------ moments that are looked up

function jump(time, index = run.record.nearest(time)) {
  if (!run || index < 0) return;
  const { record } = run;
  const reply = record.replies.find((r) => r.index === index);
  const picture = record.pictureAt(index);
  stage.peek({ time: record.time(index), blob: picture?.blob, text: reply?.text ?? record.state(index) });
  timeline.choose(record.time(index));
  transcript.mark(index);
  if (recorded() && (run.over || run.source.paused)) {
    stage.show("view");
    stage.view.pause();
    stage.view.currentTime = record.time(index) + 1e-3;
  }
}

stage.onpeekclosed = () => {
  timeline.choose(null);
  transcript.mark(-1);
};

/** Whether the seen video tells which reply stands under it; else replies come as they are given. */
function followsVideo() {
  return recorded() && (run.over || run.what.asPlayed);
}

function caption() {
  if (!run || !followsVideo()) return;
  const time = stage.view.currentTime;
  stage.caption(run.record.captionAt(time)?.text ?? "");
  timeline.playhead = run.record.count ? time : null;
  timeline.draw();
}

for (const type of ["timeupdate", "seeked", "seeking"]) stage.view.addEventListener(type, caption);

// ------------------------------------------------------------------------------------------------------- the server

async function lookAtServer() {
  const why = await diagnose();
  let next = LOOK_SELDOM;
  if (why.kind === "denied") {
    byId("server").textContent = "a token is needed";
    if (!run) askForToken();
    return; // the form looks again
  }
  if (why.kind === "unreachable") byId("server").textContent = "the server cannot be reached";
  else if (why.kind === "failed") byId("server").textContent = "the model could not be loaded";
  else {
    about = why.kind === "full" ? await server().catch(() => about) : why;
    const loading = about.status === "loading";
    next = loading ? LOOK_AGAIN : LOOK_SELDOM;
    const places = about.places ? `${about.free} of ${about.places} places free` : "";
    byId("server").textContent = loading ? `loading the model: ${about.done ?? 0} of ${about.total ?? "?"}` : places;
    if (!loading) byId("server").prepend(modelName());
    settings.offer(about);
    networkAllowed();
    byId("question").maxLength = about.limits?.query_characters ?? 2000;
    if (about.model) questions.suggest(/bundled/i.test(about.model));
    byId("fps_help").textContent = /bundled/i.test(about.model ?? "")
      ? "From the next start. The bundled model was trained at one."
      : "From the next start.";
  }
  setTimeout(lookAtServer, next);
}

function modelName() {
  const name = document.createElement("span");
  name.className = "model";
  name.textContent = `${about.model} · `;
  return name;
}

function networkAllowed() {
  const allowed = about?.sources !== false;
  byId("network_about").textContent = allowed
    ? "The server itself watches an RTSP or HTTP stream."
    : "This server takes no network streams. Whoever runs it can allow some with --source_host=HOST.";
  for (const part of byId("network").querySelectorAll("input, button")) part.disabled = !allowed;
}

function askForToken() {
  if (byId("access").open) return;
  byId("access_text").textContent = token()
    ? "The token of this tab is not the server's. The server printed it when it started, at the end of the link."
    : "The server printed it when it started, at the end of the link. It stays in this tab.";
  byId("token").value = "";
  byId("access").showModal();
}

byId("access_form").addEventListener("submit", () => {
  setToken(byId("token").value.replace(/[^\x21-\x7e]/g, "")); // as no header holds anything else
  run?.stream?.hurry();
  lookAtServer();
});
byId("access_cancel").addEventListener("click", () => byId("access").close());

// ------------------------------------------------------------------------------------------------- what can be pressed

/** Offers the cameras there are; those of a phone by the side they are on, until their names may be known. */
async function listCameras() {
  const cameras = (await Camera.list()).filter(({ label }) => label);
  const named = () => cameras.map(({ id, label }) => new Option(label, id));
  if (cameras.length) byId("camera").replaceChildren(...named());
  byId("camera").hidden = cameras.length < 2 && (cameras.length === 1 || !matchMedia("(pointer: coarse)").matches);
  byId("camera_live").replaceChildren(...named());
  const used = run?.kind === "camera" ? run.source?.device : null;
  if (used) byId("camera").value = byId("camera_live").value = used;
}

function takeFile(chosen) {
  if (!chosen) return;
  if (run && !run.over) return page.error("stop the running stream first, then choose a video");
  if (file) URL.revokeObjectURL(file);
  file = URL.createObjectURL(chosen);
  document.querySelector("[name=source][value=file]").checked = true;
  stage.source("file");
  start();
}

for (const radio of document.querySelectorAll("[name=source]")) radio.addEventListener("change", reset);
for (const button of document.querySelectorAll(".start")) button.addEventListener("click", start);
byId("network").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => {
  takeFile(byId("file").files[0]);
  byId("file").value = ""; // the same one may be chosen again
});
byId("stop").addEventListener("click", () => run?.stop());
byId("again").addEventListener("click", reset);
byId("pause").addEventListener("click", () => {
  run.source.pause(!run.source.paused);
  if (!run.source.paused) {
    stage.peek(null);
    stage.show(run.what.asPlayed ? "view" : "still");
  }
  light(run.source.paused ? "busy" : "live", run.source.paused ? "Paused" : "Watching");
  buttons();
});
byId("camera_live").addEventListener("change", () =>
  run.source.start(byId("camera_live").value).catch((error) => page.error(error.message)),
);
for (const [type, held] of [
  ["dragover", true],
  ["dragleave", false],
  ["drop", false],
]) {
  stage.element.addEventListener(type, (event) => {
    event.preventDefault();
    stage.element.classList.toggle("dropping", held);
    if (type === "drop") takeFile(event.dataTransfer.files[0]);
  });
}
byId("zoom").addEventListener("change", (event) =>
  timeline.zoom(event.target.value === "all" ? Infinity : Number(event.target.value)),
);
byId("error_close").addEventListener("click", () => page.error(""));
byId("save_events").addEventListener("click", () => save("events.jsonl", "application/jsonl", eventsJsonl(run.record)));
byId("save_captions").addEventListener("click", () => save("captions.vtt", "text/vtt", captionsVtt(run.record)));
byId("save_transcript").addEventListener("click", () =>
  save("transcript.txt", "text/plain", transcriptTxt(run.record)),
);
addEventListener("keydown", (event) => event.key === "Escape" && stage.peeking && stage.peek(null));
addEventListener("online", () => run?.stream?.hurry());
addEventListener("themechange", () => timeline.draw());
addEventListener("pagehide", () => run?.stop());

takeTokenFromAddress();
timeline.show(new Record());
reset();
lookAtServer();
