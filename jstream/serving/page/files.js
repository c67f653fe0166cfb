/* The files that can be saved, made in the browser of what was received. The rules of captions.vtt are those of the
 * command line (`captions` in streaming/recording.py); nothing is sent anywhere. */

import { clock, readingTime } from "./record.js";

const LINE_ENDS = /\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/u;

/** One line an event, verbatim. */
export function eventsJsonl(record) {
  return record.lines.map((line) => `${line}\n`).join("");
}

/** The replies as WebVTT. Source: W3C WebVTT, section 4. */
export function captionsVtt(record) {
  const replies = record.replies
    .map(({ time, text }) => [Math.max(0, roundHalfEven(1000 * time)), cueText(text)])
    .filter(([, text]) => text);
  const blocks = ["WEBVTT"];
  replies.forEach(([time, text], n) => {
    const read = time + roundHalfEven(1000 * readingTime(text));
    let after = n + 1;
    while (after < replies.length && replies[after][0] === time) after += 1;
    const end = Math.min(read, replies[after]?.[0] ?? read);
    blocks.push(`${n + 1}\n${timestamp(time)} --> ${timestamp(end)}\n${escaped(text)}`);
  });
  return `${blocks.join("\n\n")}\n`;
}

/** What was asked and said, for reading. */
export function transcriptTxt(record) {
  const lines = [
    ...record.questions.map(({ time, text }) => [time, 0, `asked: ${text}`]),
    ...record.gaps.map(({ from, to, reason }) => [from, 2, `(${reason}${to === null ? "" : `, until ${clock(to)}`})`]),
    ...record.replies.map(({ time, text }) => [time, 1, text]),
  ];
  lines.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  return lines.map(([time, , text]) => `${clock(time)}  ${text.replace(/\s+/gu, " ").trim()}\n`).join("");
}

export function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function cueText(text) {
  const lines = text.split(LINE_ENDS).map((line) =>
    line
      .split(/\s+/u)
      .join(" ")
      .replace(/[\p{Cc}\p{Cs}]/gu, "")
      .trim(),
  );
  return lines.filter((line) => line).join("\n");
}

function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function timestamp(milliseconds) {
  const seconds = Math.floor(milliseconds / 1000);
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  return `${parts.map((n) => String(n).padStart(2, "0")).join(":")}.${String(milliseconds % 1000).padStart(3, "0")}`;
}

/** As Python rounds. */
function roundHalfEven(x) {
  const rounded = Math.round(x);
  return Math.abs(x % 1) === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}
