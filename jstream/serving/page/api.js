/* The server over HTTP: addresses, the token, refusals, and why a stream does not come about. It keeps the token in
 * this tab alone, and it opens no stream. */

const KEY = "jstream.token";
let kept = null; // for browsers that refuse sessionStorage

/** The token of this tab, or "". */
export function token() {
  try {
    return kept ?? sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setToken(value) {
  kept = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // It lasts as long as the page, then.
  }
}

/** Takes a token out of the address bar (`#token=…`), where it would be seen, copied and kept in the history. */
export function takeTokenFromAddress() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!found) return;
  setToken(found);
  history.replaceState(null, "", location.pathname + location.search);
}

/** The address of a path of the server, which may itself lie behind a prefix. */
export function address(path, scheme = "http") {
  const url = new URL(path, document.baseURI);
  if (scheme === "ws") url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url;
}

/** An answer other than 2xx; `message` is the server's sentence. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * Calls the server with the token; `json` becomes the body.
 * Returns the Response. Throws Refusal, or TypeError where the server cannot be reached.
 */
export async function call(path, { json, headers = {}, ...options } = {}) {
  const all = { ...headers };
  if (token()) all.Authorization = `Bearer ${token()}`;
  if (json !== undefined) all["Content-Type"] = "application/json";
  const body = json === undefined ? undefined : JSON.stringify(json);
  const answer = await fetch(address(path), { cache: "no-store", ...options, headers: all, body });
  if (answer.ok) return answer;
  let detail = `the server answered ${answer.status}`;
  try {
    const told = (await answer.json()).detail;
    if (typeof told === "string") detail = told;
  } catch {
    // Something between us and the server answered; its status must do.
  }
  throw new Refusal(answer.status, detail);
}

/** What `/v1/server` tells. */
export async function server() {
  return (await call("v1/server")).json();
}

/**
 * Why a stream may not have come about. Browsers do not tell why a WebSocket was refused, so this asks over HTTP.
 * Returns {kind: "denied" | "loading" | "failed" | "full" | "unreachable" | "ready", …what is known of it}.
 */
export async function diagnose() {
  let about;
  try {
    about = await server();
  } catch (error) {
    if (error instanceof Refusal && error.status === 401) return { kind: "denied", message: error.message };
    return { kind: "unreachable", message: error instanceof Refusal ? error.message : "the server cannot be reached" };
  }
  if (about.status === "loading") return { kind: "loading", ...about };
  if (about.status === "failed") return { kind: "failed", message: about.error ?? "the model could not be loaded" };
  if (about.free === 0) return { kind: "full", places: about.places, message: "all places are taken" };
  return { kind: "ready", ...about };
}
