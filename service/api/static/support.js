// What a model has learnt to draw, as GET /models describes it: how many objects, and where. The service refuses the
// rest; this says so before, with the arithmetic of shared/support.py. Places are {x, y} in fractions of the picture's
// width and height, and distances are in these fractions. Knows no elements.

import { counted } from "./words.js";

const STEP = 0.05; // between the places that `free` considers
const ROOMY = 0.22; // objects as far apart as this do not hide each other
const ROUNDS = 12; // in which `clamp` looks for a place that is inside and apart
const SLACK = 0.011; // places are rounded to 0.01

const distance = (one, other) => Math.hypot(one.x - other.x, one.y - other.y);
const closest = (places, to) => places.reduce((best, one) => (distance(one, to) < distance(best, to) ? one : best));
const within = (value) => Math.min(1, Math.max(0, value));
const rounded = ({ x, y }) => ({ x: Math.round(100 * x) / 100, y: Math.round(100 * y) / 100 });

export class Support {
  /** Of a model from GET /models; one that says nothing about its range refuses nothing. */
  constructor({ support } = {}) {
    const { objects: [low, high] = [1, Infinity], area, nearest } = support ?? {};
    this.low = Math.max(1, low);
    this.high = high;
    this.area = area?.length ? area.map(([x, y]) => ({ x, y })) : null; // corners by increasing angle
    this.nearest = nearest ?? 0;
  }

  /** "1 to 10 objects"; empty without a range. */
  get range() {
    if (this.high === Infinity) return "";
    const numbers = this.low === this.high ? this.high : `${this.low} to ${this.high}`;
    return `${numbers} ${this.high === 1 ? "object" : "objects"}`;
  }

  /** Why a picture of so many objects cannot be drawn, or null. */
  countProblem(count) {
    if (count >= this.low && count <= this.high) return null;
    return `${counted(count, "object")}: this model draws ${this.range} in a picture.`;
  }

  /** Why an object cannot stand at a place, with the `others` where they are, or null. */
  placeProblem(place, others) {
    if (distance(this.#inside(place), place) > SLACK) return "This model has seen no objects outside the outlined area.";
    if (others.some((one) => distance(one, place) < this.nearest - SLACK)) {
      return "This model has seen no two objects as near to each other.";
    }
    return null;
  }

  /** The possible place that is nearest to `to`, or null. */
  clamp(to, others) {
    let place = this.#inside({ x: within(to.x), y: within(to.y) });
    for (let round = 0; round < ROUNDS && others.length; round++) {
      const other = closest(others, place);
      if (distance(other, place) >= this.nearest) break;
      place = this.#inside(this.#away(place, other));
    }
    place = rounded(place);
    return this.placeProblem(place, others) ? null : place;
  }

  /** A place for one more object: near the middle, or else where there is most room. */
  free(taken) {
    const count = Math.round(1 / STEP) + 1;
    const all = Array.from({ length: count * count }, (_, i) => rounded({ x: STEP * (i % count), y: STEP * Math.floor(i / count) }));
    const middle = this.#middle();
    const inside = all.filter((place) => distance(this.#inside(place), place) < 1e-9);
    const candidates = [middle, ...inside.sort((one, other) => distance(one, middle) - distance(other, middle))];
    const room = (place) => Math.min(Infinity, ...taken.map((one) => distance(one, place)));
    return (
      candidates.find((place) => room(place) >= Math.max(ROOMY, this.nearest)) ??
      candidates.reduce((best, place) => (room(place) > room(best) ? place : best))
    );
  }

  #middle() {
    const corners = this.area ?? [{ x: 0, y: 0 }, { x: 1, y: 1 }];
    const half = (values) => (Math.min(...values) + Math.max(...values)) / 2;
    return this.#inside(rounded({ x: half(corners.map(({ x }) => x)), y: half(corners.map(({ y }) => y)) }));
  }

  /** The place itself in the area, or else the nearest one on its border. */
  #inside(place) {
    if (!this.area) return place;
    if (this.area.length < 3) return closest(this.area, place);
    const edges = this.area.map((corner, i) => [corner, this.area[(i + 1) % this.area.length]]);
    const isLeft = ([a, b]) => (b.x - a.x) * (place.y - a.y) - (b.y - a.y) * (place.x - a.x) >= 0;
    return edges.every(isLeft) ? place : closest(edges.map((edge) => nearestOn(edge, place)), place);
  }

  /** The nearest place that is apart from `other`. */
  #away(place, other) {
    const apart = distance(place, other);
    const [dx, dy] = apart ? [(place.x - other.x) / apart, (place.y - other.y) / apart] : [1, 0];
    return { x: within(other.x + this.nearest * dx), y: within(other.y + this.nearest * dy) };
  }
}

/** The width over the height at which a model's pictures are shown; null for an unknown model. */
export function ratioOf(model) {
  if (!model) return null;
  // A network that draws 4:3 pictures squeezed to squares says so in `proportions`; squeezed, spheres look like eggs.
  const [width, height] = model.config.proportions ?? model.size ?? [1, 1];
  return width / height;
}

/** The place on a line from a to b that is nearest to `place`. */
function nearestOn([a, b], place) {
  const [dx, dy] = [b.x - a.x, b.y - a.y];
  const along = within(((place.x - a.x) * dx + (place.y - a.y) * dy) / (dx * dx + dy * dy || 1));
  return { x: a.x + along * dx, y: a.y + along * dy };
}
