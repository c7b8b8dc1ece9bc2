// Talks to the gateway: the key, errors with their fields, and streams of events.

let key = sessionStorage.getItem("key") ?? localStorage.getItem("key") ?? "";

export const hasKey = () => key !== "";
export const isKeyRemembered = () => localStorage.getItem("key") !== null;

export function setKey(value, { remember }) {
  key = value.trim();
  sessionStorage.removeItem("key");
  localStorage.removeItem("key");
  if (key) (remember ? localStorage : sessionStorage).setItem("key", key);
}

/** What the gateway said in place of what was asked for; `fields` has a problem by field. */
export class ApiError extends Error {
  constructor(status, error = {}, retryAfter = null) {
    super(error.message || `the gateway replied ${status}`);
    this.status = status;
    this.fields = error.fields ?? {};
    this.retryAfter = retryAfter;
  }
}

export async function getJson(path) {
  return (await request(path)).json();
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The gateway cannot be reached." });
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new ApiError(response.status, body.error, response.headers.get("retry-after"));
  }
  return response;
}

export function newRequestId() {
  const words = crypto.getRandomValues(new Uint32Array(4));
  return `page-${[...words].map((word) => word.toString(36)).join("")}`;
}

/** Cancel a request, where it still runs. */
export function cancelRequest(requestId) {
  request(`/v1/requests/${requestId}`, { method: "DELETE" }).catch(() => {});
}

/**
 * Post a body and yield the events of the reply.
 * The first is `{type: "accepted"}`: the reply begins when an instance has taken the request.
 */
export async function* postForEvents(path, body, requestId, signal) {
  const headers = { "Content-Type": "application/json", "X-Request-Id": requestId };
  const response = await request(path, {
    method: "POST", headers, body: JSON.stringify(body), signal,
  });
  yield { type: "accepted" };
  for await (const data of dataLines(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.status ?? 500, event.error);
    yield event;
  }
  throw new ApiError(0, { message: "The connection ended before the picture was finished." });
}

async function* dataLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    // Only what is new can hold the end: an event may be megabytes long.
    const searchFrom = Math.max(0, pending.length - 1);
    pending += value;
    let start = 0;
    let end = pending.indexOf("\n\n", searchFrom);
    while (end >= 0) {
      const line = pending.slice(start, end).split("\n").find((each) => each.startsWith("data: "));
      if (line) yield line.slice(6);
      start = end + 2;
      end = pending.indexOf("\n\n", start);
    }
    pending = pending.slice(start);
  }
}
