// Shows a vocabulary: which labels are colour x shape, and a drawing for each label.

import { h, svg } from "./dom.js";

// The colours of the renderer's objects in its light. Other colours are drawn as CSS names them.
const COLOURS = {
  __proto__: null, // "constructor" may be a label
  gray: "#7e8186",
  red: "#c2382e",
  blue: "#3d5fdc",
  green: "#2f8f3a",
  brown: "#8f5d2e",
  purple: "#8f43c9",
  cyan: "#2fc4c4",
  yellow: "#e6c42a",
};
const FULL_ENOUGH = 0.5; // fraction of the product's cells that must exist to show groups

const SHAPES = {
  __proto__: null,
  cube: (fill) => [
    svg("path", { d: "M4 7.2 12 11.4V21L4 16.8Z", fill }),
    svg("path", { d: "M20 7.2 12 11.4V21L20 16.8Z", fill }),
    svg("path", { d: "M20 7.2 12 11.4V21L20 16.8Z", fill: "#000", "fill-opacity": 0.24 }),
    svg("path", { d: "M12 3 20 7.2 12 11.4 4 7.2Z", fill }),
    svg("path", { d: "M12 3 20 7.2 12 11.4 4 7.2Z", fill: "#fff", "fill-opacity": 0.3 }),
  ],
  sphere: (fill) => [
    svg("circle", { cx: 12, cy: 12, r: 8.6, fill }),
    svg("circle", { cx: 12, cy: 12, r: 8.6, fill: "url(#ball-light)" }),
  ],
  cylinder: (fill) => [
    svg("path", { d: "M5 6.6V17.6C5 19.3 8.1 20.7 12 20.7S19 19.3 19 17.6V6.6Z", fill }),
    svg("path", { d: "M5 6.6V17.6C5 19.3 8.1 20.7 12 20.7S19 19.3 19 17.6V6.6Z", fill: "url(#side-light)" }),
    svg("ellipse", { cx: 12, cy: 6.6, rx: 7, ry: 3.1, fill }),
    svg("ellipse", { cx: 12, cy: 6.6, rx: 7, ry: 3.1, fill: "#fff", "fill-opacity": 0.3 }),
  ],
};

const colourOf = (word) => COLOURS[word] ?? (/^[a-z]+$/.test(word) && CSS.supports("color", word) ? word : null);

/** "dark red cube" -> ["dark red", "cube"]; a single word has no second part. */
function parts(label) {
  const words = label.trim().split(/\s+/);
  return words.length > 1 ? [words.slice(0, -1).join(" "), words.at(-1)] : [label, ""];
}

/**
 * How to lay labels out: {visual, groups: [{name, labels: [{label, text}]}]}. Groups are rows of equal length when
 * `visual` (a colour for each column, a shape for each row); `text` distinguishes a label within its group.
 */
export function layout(labels) {
  const split = labels.map((label) => [label, ...parts(label)]);
  const firsts = [...new Set(split.map(([, first]) => first))];
  const lasts = [...new Set(split.map(([, , last]) => last))];
  const product = firsts.length > 1 && lasts.length > 1 && !lasts.includes("");
  if (!product || labels.length < FULL_ENOUGH * firsts.length * lasts.length) {
    return { visual: false, groups: [{ name: "", labels: labels.map((label) => ({ label, text: label })) }] };
  }
  const groups = lasts.map((last) => ({
    name: last,
    labels: split.filter((one) => one[2] === last).map(([label, text]) => ({ label, text })),
  }));
  const whole = labels.length === firsts.length * lasts.length;
  return { visual: whole && firsts.every(colourOf) && lasts.every((last) => last in SHAPES), groups };
}

/** A drawing for a label: the object, a swatch of its colour, or its first letters. */
export function drawing(label) {
  const [first, last] = parts(label);
  const colour = colourOf(first);
  const shape = SHAPES[last];
  const attributes = { class: "drawing", viewBox: "0 0 24 24", "aria-hidden": "true" };
  if (colour && shape) return svg("svg", attributes, shape(colour));
  if (colour) return svg("svg", attributes, svg("circle", { cx: 12, cy: 12, r: 7, fill: colour }));
  return h("span", { class: "drawing letters", "aria-hidden": "true" }, [...label].slice(0, 2).join(""));
}

/** "red cube, blue sphere and gray cylinder" */
export function listed(labels) {
  return labels.length < 2 ? labels.join("") : `${labels.slice(0, -1).join(", ")} and ${labels.at(-1)}`;
}
