// Calls the API: the key, readable errors, pictures as blobs, server-sent events. Knows nothing about the page.
// Everything goes through fetch, because neither <img> nor EventSource can send the key's header.

const KEY = "labelgrid.key";
const TRIES = 3;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8000;
const TOO_MANY = 429;
const SILENCE_MS = 15_000; // the service sends a comment about every second

/** What the browser keeps for this page; where it blocks that, as together with cookies, it is gone with the page. */
export const storage = (() => {
  try {
    return localStorage;
  } catch {
    const kept = new Map();
    return { getItem: (name) => kept.get(name), setItem: (name, value) => kept.set(name, value), removeItem: (name) => kept.delete(name) };
  }
})();

export const apiKey = {
  get: () => storage.getItem(KEY) ?? "",
  set: (value) => (value ? storage.setItem(KEY, value) : storage.removeItem(KEY)),
};

/**
 * What went wrong, as a message. `status` is 0 without an answer, null if nothing was sent; `entry` is the label list at
 * fault, from 0; before `waitMs` are over another request is of no use.
 */
export class Problem extends Error {
  constructor(words, { status = 0, entry = null, waitMs = FIRST_PAUSE_MS } = {}) {
    super(words);
    Object.assign(this, { status, entry, waitMs });
  }

  /** Whether the same request may succeed later. */
  get mayPass() {
    return this.status === 0 || this.status === TOO_MANY || this.status >= 500;
  }
}

/** The address of an API path, also if a proxy serves the page under a prefix. */
export const address = (path) => new URL(path.replace(/^\//, ""), document.baseURI.split("#")[0]).href;

/**
 * Sends a request and returns what read(response) makes of the answer. Tries again without a whole answer: a job is
 * created once, because of its Idempotency-Key. Not if `once`: a job that is cancelled or deleted twice is an error.
 */
async function request(path, read, { headers = {}, once = false, ...init } = {}) {
  const key = apiKey.get();
  if (/[^\0-\xff]/.test(key)) throw new Problem("The API key has a character that cannot be sent. Copy the key again.", { status: 401 });
  const all = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  for (let left = once ? 0 : TRIES - 1; ; left--) {
    try {
      const response = await fetch(address(path), { ...init, headers: all });
      if (!response.ok) throw await problemOf(response);
      return await read(response);
    } catch (error) {
      if (error.name === "AbortError" || error instanceof Problem) throw error;
      if (left === 0) throw new Problem("The service does not answer. Check that it is running and that you are online.");
      await pause(FIRST_PAUSE_MS);
    }
  }
}

async function problemOf(response) {
  const body = await response.json().catch(() => ({}));
  const { status } = response;
  let words = sentence(body.detail ?? body.title ?? `The service answered with status ${status}`);
  if (status === 401) words = apiKey.get() ? "The API key was not accepted." : "This service requires an API key.";
  const after = Number(response.headers.get("Retry-After"));
  if (after > 0) words += ` Try again in ${after} s.`;
  return new Problem(words, { status, entry: body.entry ?? null, waitMs: after > 0 ? 1000 * after : undefined });
}

function sentence(text) {
  const unnamed = String(text).replace(/^(?:recipe\.)?trajectory: /, ""); // its field is called Stages
  const counted = unnamed.replace(/^(?:entry |[a-z_.]+\.)(\d+): /, (_, entry) => `Picture ${Number(entry) + 1}: `);
  const capital = counted.charAt(0).toUpperCase() + counted.slice(1);
  return /[.?!]$/.test(capital) ? capital : `${capital}.`;
}

const json = (path, init) => request(path, (response) => response.json(), init);

export const readLabels = (model) => json(model ? `labels?model=${encodeURIComponent(model)}` : "labels");
export const readModels = () => json("models");
export const readDescription = () => json("openapi.json");
export const readReady = () => json("readyz");
export const readJob = (id) => json(`jobs/${encodeURIComponent(id)}`);
export const readJobs = (limit, cursor) => json(`jobs?${new URLSearchParams({ limit, ...(cursor && { cursor }) })}`);
export const cancelJob = (id) => json(`jobs/${encodeURIComponent(id)}/cancel`, { method: "POST", once: true });
export const deleteJob = (id) => json(`jobs/${encodeURIComponent(id)}`, { method: "DELETE", once: true });

/** Reads a picture, or a zip of them, as a blob: URL, which the caller revokes. */
export async function readPicture(path, signal) {
  return URL.createObjectURL(await request(path, (response) => response.blob(), { signal }));
}

/** The same, but waits while the key has too many requests. */
export async function readPictureInTurn(path, signal) {
  for (;;) {
    try {
      return await readPicture(path, signal);
    } catch (error) {
      if (error.status !== TOO_MANY) throw error;
      await pause(error.waitMs);
    }
  }
}

/** Creates a job; the Idempotency-Key makes every attempt the same one. */
export function createJob(path, body) {
  const form = body instanceof FormData;
  const headers = { Prefer: "respond-async", "Idempotency-Key": randomKey() };
  if (!form) headers["Content-Type"] = "application/json";
  return json(path, { method: "POST", headers, body: form ? body : JSON.stringify(body) });
}

function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Calls tell(event, data) for each event of a job until it ends; reconnects when the connection breaks or goes silent.
 * Throws a Problem if the job cannot be read; returns once `signal` is aborted.
 */
export async function follow(id, tell, signal) {
  let last = null;
  let wait = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    const silence = new AbortController();
    let timer;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
    };
    try {
      heard();
      const headers = last ? { "Last-Event-ID": last } : {};
      const response = await request(`jobs/${encodeURIComponent(id)}/events`, (answer) => answer, {
        headers,
        signal: AbortSignal.any([signal, silence.signal]),
      });
      if (response.status === 204) return tell("end", await readJob(id)); // it ended, and its events are gone
      for await (const event of eventsOf(response.body, heard)) {
        wait = FIRST_PAUSE_MS;
        last = event.id ?? last;
        tell(event.name, JSON.parse(event.data));
        if (event.name === "end") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof SyntaxError || (error instanceof Problem && !error.mayPass)) throw error;
      wait = Math.max(wait, error.waitMs ?? 0);
    } finally {
      clearTimeout(timer);
    }
    await pause(wait);
    wait = Math.min(2 * wait, LONGEST_PAUSE_MS);
  }
}

/** Yields the events of a text/event-stream body: {name, data, id}. Calls heard() whenever something arrives. */
async function* eventsOf(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    const blocks = (text + value).split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", data: "", id: null };
      for (const line of block.split(/\r?\n/)) {
        const [, field, content] = /^([^:]*):? ?(.*)$/.exec(line);
        if (field === "event") event.name = content;
        else if (field === "id") event.id = content;
        else if (field === "data") event.data += content;
      }
      if (event.data) yield event;
    }
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
