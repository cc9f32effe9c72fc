// A square in which objects are placed by dragging or arrow keys. A place is {x, y} in fractions of the picture's
// width and height, from its upper left corner.

import { announce, find, h } from "./dom.js";
import { drawing } from "./labels.js";
import { percent } from "./words.js";

const STEP = 0.05; // of an arrow key
const FINE_STEP = 0.01; // with Shift
const APART = 0.12; // objects nearer than this hide each other
// The initial places of objects: in the middle, then around it.
const FIRST_PLACES = [[0.5, 0.43], [0.28, 0.52], [0.72, 0.52], [0.4, 0.7], [0.6, 0.25], [0.22, 0.3], [0.78, 0.3], [0.7, 0.75]].map(
  ([x, y]) => ({ x, y }),
);

/** The places of `labels`; a label without one gets a free one. */
export function placed(labels, places = {}) {
  const taken = labels.map((label) => places[label]).filter(Boolean);
  const all = labels.map((label) => {
    if (places[label]) return [label, places[label]];
    const free = FIRST_PLACES.find((one) => taken.every(({ x, y }) => Math.hypot(x - one.x, y - one.y) > APART));
    taken.push(free ?? FIRST_PLACES[0]);
    return [label, taken.at(-1)];
  });
  return Object.fromEntries(all);
}

/** Shows the places of one picture; calls `moved(label, place)` while an object moves. */
export class Places {
  constructor(moved) {
    this.moved = moved;
    this.square = find("#places");
  }

  show(places) {
    this.square.replaceChildren(...Object.entries(places).map(([label, place]) => this.#object(label, place)));
  }

  #object(label, place) {
    const button = h("button", { class: "place", type: "button", "data-label": label, title: label }, drawing(label));
    const put = (to) => {
      place = { x: within(to.x), y: within(to.y) };
      button.style.left = `${100 * place.x}%`;
      button.style.top = `${100 * place.y}%`;
      const words = `${label}, ${percent(place.x)} from the left, ${percent(place.y)} from the top`;
      button.setAttribute("aria-label", words);
      return words;
    };
    const move = (to) => {
      const words = put(to);
      this.moved(label, place);
      return words;
    };
    put(place);
    button.addEventListener("pointerdown", (event) => button.setPointerCapture(event.pointerId));
    button.addEventListener("pointermove", (event) => {
      if (!button.hasPointerCapture(event.pointerId)) return;
      const box = this.square.getBoundingClientRect();
      move({ x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
    });
    button.addEventListener("keydown", (event) => {
      const by = event.shiftKey ? FINE_STEP : STEP;
      const [dx, dy] = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key] ?? [];
      if (dx === undefined) return;
      event.preventDefault();
      announce(move({ x: place.x + dx, y: place.y + dy }));
    });
    return button;
  }
}

const within = (fraction) => Math.round(100 * Math.min(1, Math.max(0, fraction))) / 100;
