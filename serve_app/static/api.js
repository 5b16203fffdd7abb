// The API as the pages call it: the key, /pages/info, streamed answers, errors by kind.

const KEY = "rayseek.key";
let localKey = null; // the server told it, because this browser is on its machine

/** The key that the user signed in with, or null. */
export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? localKey;
  } catch {
    return localKey;
  }
}

/** Keeps a key for this tab, or, with `lasting`, for this browser; null forgets it. */
export function keepKey(value, lasting = false) {
  localKey = value;
  try {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (value) (lasting ? localStorage : sessionStorage).setItem(KEY, value);
  } catch {
    // storage may be forbidden: the key then lasts as long as the page
  }
}

/** A link from the server's terminal carries the key behind `#`, which no server ever sees. */
export function takeKeyFromAddress() {
  const found = new URLSearchParams(location.hash.slice(1)).get("key");
  if (found === null) return;
  keepKey(found);
  history.replaceState(null, "", location.pathname + location.search);
}

function authorization() {
  return key() ? { Authorization: `Bearer ${key()}` } : {};
}

/** Why a call failed. `kind`: key, forbidden, rate, busy, network, cut, request, server. */
export class Failure extends Error {
  constructor(kind, detail = "", retryAfter = null) {
    super(detail || kind);
    Object.assign(this, { kind, detail, retryAfter });
  }
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...authorization(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("network");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const detail = body?.error?.message ?? "";
  const wait = Number.parseInt(answer.headers.get("retry-after") ?? "", 10);
  const kinds = { 401: "key", 403: "forbidden", 429: "rate", 502: "busy", 503: "busy", 504: "busy" };
  const kind = kinds[answer.status] ?? (answer.status < 500 ? "request" : "server");
  throw new Failure(kind, detail, Number.isNaN(wait) ? null : wait);
}

export async function info() {
  const found = await (await call("pages/info")).json();
  if (found.key && !found.signed_in) keepKey(null); // the one that was kept is no longer valid
  localKey = found.key;
  return found;
}

/** The state of the cluster's units; for those with a key. */
export async function cluster() {
  return (await call("api/cluster")).json();
}

/** Throws a Failure of kind `key` unless `value` is accepted. */
export async function tryKey(value) {
  await call("v1/models", { headers: { Authorization: `Bearer ${value}` } });
}

/** Asks for an answer and yields its chunks as they come. */
export async function* chunks(body, signal) {
  const answer = await call("v1/chat/completions", {
    method: "POST", signal, body: JSON.stringify({ ...body, stream: true }),
    headers: { "Content-Type": "application/json" },
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let complete = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done && complete) return;
      if (done) throw new Failure("cut");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment that keeps the line open
        complete ||= event === "data: [DONE]";
        if (complete) continue; // the end of the connection is near: hanging up would look like a stop
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new Failure("server", chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    throw error instanceof Failure || error.name === "AbortError" ? error : new Failure("cut");
  } finally {
    reader.cancel().catch(() => {});
  }
}
