// Elements without HTML text: what models, users and files wrote only ever becomes text nodes.

/** @typedef {Node | string | number | null | undefined | false} Child */

/**
 * An element.
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `class`, `on` ({click: handler}), properties that are not strings, attributes
 * @param {...Child} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  setAttributes(element, attributes);
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false).map(asNode));
  return element;
}

/**
 * An element of SVG.
 * @param {string} tag
 * @param {Record<string, string | number>} [attributes]
 * @param {...Child} children
 * @returns {any}
 */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false).map(asNode));
  return element;
}

/** @param {Child} child */
function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(String(child));
}

function setAttributes(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    } else if (/^on/i.test(name)) {
      throw new Error(`${name}: pass handlers in "on"`);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
}

/**
 * The element with this id, which must exist.
 * @param {string} id
 * @returns {any}
 */
export function at(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`no element ${id}`);
  return found;
}

/** Sets a text only if it differs, so that selections and screen readers are left in peace. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Says something to screen readers. @param {string} text */
export function announce(text) {
  setText(at("announce"), text);
}

/** Offers a file for saving. @param {string} name @param {Blob} blob */
export function save(name, blob) {
  const url = URL.createObjectURL(blob);
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** A file name from any text. @param {string} text */
export function fileName(text) {
  return text.replace(/[^A-Za-z0-9._-]+/g, "_").slice(0, 100) || "file";
}

/** A message in a view. @param {HTMLElement} view @param {string} text @param {string} [kind] */
export function message(view, text, kind = "muted") {
  view.replaceChildren(h("p", { class: kind, role: kind === "bad" ? "alert" : null }, text));
}

/** Whether a key is text that someone types. @param {EventTarget | null} target */
export function isTyping(target) {
  const typed = target instanceof HTMLInputElement && target.type !== "checkbox";
  return typed || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement;
}
