// A frame of the picture's proportions in which objects are placed by dragging or arrow keys, no further than the model
// has learnt. A place is {x, y} in fractions of the picture's width and height, from its upper left corner.

import { announce, find, h, svg } from "./dom.js";
import { drawing } from "./labels.js";
import { percent } from "./words.js";

const STEP = 0.05; // of an arrow key
const FINE_STEP = 0.01; // with Shift
const HINT = "Drag the objects, or move them with the arrow keys.";

/** The places of `labels`; a label without one gets a free one. */
export function placed(labels, support, places = {}) {
  const all = Object.fromEntries(labels.filter((label) => places[label]).map((label) => [label, places[label]]));
  for (const label of labels) all[label] ??= support.free(Object.values(all));
  return all;
}

/** Why the service would refuse the places, or null; names the object. */
export function placesProblem(places, support) {
  for (const [label, place] of Object.entries(places)) {
    const problem = support.placeProblem(place, othersOf(places, label));
    if (problem) return `${label}: ${problem}`;
  }
  return null;
}

const othersOf = (places, label) => Object.entries(places).filter(([other]) => other !== label).map(([, place]) => place);

/** Shows the places of one picture; calls `moved(label, place)` while an object moves. */
export class Places {
  constructor(moved) {
    this.moved = moved;
    this.frame = find("#places");
    this.hint = find("#places-hint");
    this.places = {};
  }

  /** `ratio`: the picture's width over its height. */
  show(places, support, ratio) {
    Object.assign(this, { places, support });
    this.frame.style.aspectRatio = ratio;
    const corners = support.area?.map(({ x, y }) => `${100 * x},${100 * y}`).join(" ");
    const area = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("polygon", { points: corners }));
    this.frame.replaceChildren(...(corners ? [area] : []), ...Object.keys(places).map((label) => this.#object(label)));
    this.#explain(placesProblem(places, support));
  }

  #object(label) {
    const button = h("button", { class: "place", type: "button", "data-label": label, title: label }, drawing(label));
    button.addEventListener("pointerdown", (event) => button.setPointerCapture(event.pointerId));
    button.addEventListener("pointermove", (event) => {
      if (!button.hasPointerCapture(event.pointerId)) return;
      const box = this.frame.getBoundingClientRect();
      this.#move(button, { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
    });
    button.addEventListener("keydown", (event) => {
      const by = event.shiftKey ? FINE_STEP : STEP;
      const [dx, dy] = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key] ?? [];
      if (dx === undefined) return;
      event.preventDefault();
      const { x, y } = this.places[label];
      const problem = this.#move(button, { x: x + dx, y: y + dy });
      announce([button.getAttribute("aria-label"), problem].filter(Boolean).join(". "));
    });
    this.#put(button);
    return button;
  }

  /** Moves an object to the nearest possible place, and returns why that is not `to`, or null. */
  #move(button, to) {
    const { label } = button.dataset;
    const others = othersOf(this.places, label);
    const problem = this.support.placeProblem(to, others);
    const place = this.support.clamp(to, others);
    if (place) {
      this.places = { ...this.places, [label]: place };
      this.#put(button);
      this.moved(label, place);
    }
    this.#explain(problem ?? placesProblem(this.places, this.support));
    return problem;
  }

  #put(button) {
    const { x, y } = this.places[button.dataset.label];
    button.style.left = `${100 * x}%`;
    button.style.top = `${100 * y}%`;
    button.setAttribute("aria-label", `${button.dataset.label}, ${percent(x)} from the left, ${percent(y)} from the top`);
  }

  #explain(problem) {
    this.hint.textContent = problem ?? HINT;
    this.hint.toggleAttribute("data-wrong", problem !== null);
  }
}
