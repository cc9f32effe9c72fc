// Builds elements. Without `style` attributes, because the content policy forbids them.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("button", {class: "quiet", onclick: f, "aria-label": "..."}, "text", child, ...). */
export function h(tag, attributes = {}, ...children) {
  return dressed(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return dressed(document.createElementNS(SVG, tag), attributes, children);
}

function dressed(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const find = (selector) => document.querySelector(selector);

/** Announces something to screen readers through the page's live region. */
export function announce(words) {
  find("#announcer").textContent = words;
}

/** Copies text and says so on the button for a moment. */
export async function copy(text, button) {
  const before = (button.dataset.text ??= button.textContent); // which may be "Copied" by now
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Cannot copy"; // no permission, or a page without TLS on another host
  }
  announce(button.textContent);
  setTimeout(() => (button.textContent = before), 1500);
}

/** Downloads a blob: URL under a name. */
export function save(blobUrl, name) {
  h("a", { href: blobUrl, download: name }).click();
}
