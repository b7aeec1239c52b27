// Requests to the app, as JSON. Errors have the text that the server gave.

/** @typedef {Record<string, string | number | boolean | null | undefined | string[]>} Query */

/**
 * @param {string} path
 * @param {Query} [query] lists are repeated, null and undefined left out
 */
export function address(path, query = {}) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (Array.isArray(value)) value.forEach((each) => parts.append(name, each));
    else if (value !== null && value !== undefined && value !== "") parts.append(name, String(value));
  }
  const text = parts.toString();
  return text ? `${path}?${text}` : path;
}

/** @param {string} path @param {Query} [query] @param {AbortSignal} [signal] */
export async function read(path, query = {}, signal = undefined) {
  return parsed(await fetch(address(path, query), { signal, headers: { Accept: "application/json" } }));
}

/** @param {string} path @param {object} content */
export async function write(path, content) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) };
  return parsed(await fetch(path, options));
}

/** @param {Response} response */
async function parsed(response) {
  const content = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = new Error(content?.error?.message || `${response.status} ${response.statusText}`);
    throw Object.assign(error, { status: response.status });
  }
  return content;
}

/**
 * Follows a stream of server-sent events for ever: after a restart of the server it connects again.
 * @param {string} path
 * @param {(content: any) => void} receive
 * @param {(state: "open" | "lost" | "refused") => void} changed
 */
export function follow(path, receive, changed) {
  const source = new EventSource(path);
  source.onopen = () => changed("open");
  source.onmessage = (event) => receive(JSON.parse(event.data));
  source.onerror = async () => {
    source.close();
    const refused = await fetch("/api/session").then((response) => response.status === 401, () => false);
    changed(refused ? "refused" : "lost");
    setTimeout(() => follow(path, receive, changed), 2000);
  };
}
