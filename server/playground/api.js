/** The server's routes as the page uses them. Addresses are relative, so that the page works behind a path prefix. */

const KEY = "chorus-api-key";

let held = ""; // where storage is closed to this page, the key is asked for anew on each visit

export const key = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? held;
    } catch {
      return held;
    }
  },
  wanted: false, // whether the server has asked for one
  set(value) {
    held = value;
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      console.info("Storage is closed: the key is kept for this visit only.");
    }
  },
};

/** An answer other than success. `status` is 0 if there was none; `retryAfter` in seconds. */
export class ApiError extends Error {
  constructor(status, type, message, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, type, retryAfter });
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The server does not answer.");
  }
  if (response.ok) return response;
  if (response.status === 401) key.wanted = true;
  const body = await response.json().catch(() => ({}));
  const told = typeof body.error === "object" && body.error ? body.error : { message: body.error, type: body.error_type };
  const message = told.message ?? body.missing?.join("; ") ?? `The server answered ${response.status}.`;
  throw new ApiError(response.status, told.type ?? "", String(message), Number(response.headers.get("retry-after")) || 0);
}

const posted = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const getJson = async (path) => (await call(path)).json();
export const postJson = async (path, body) => (await call(path, posted(body))).json();

/** The events of a stream, parsed. Throws ApiError, also for an error event. */
export async function* events(path, body, signal) {
  const response = await call(path, { ...posted(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
      if (!data.length) continue;
      const event = JSON.parse(data.join("\n"));
      if (event.error) throw new ApiError(200, event.error_type ?? "", String(event.error));
      yield event;
    }
  }
}
