// What a model has learnt to draw, as GET /models describes it: how many objects, and where. The service refuses the
// rest; this says so before, with the arithmetic of shared/support.py. Places are {x, y} in fractions of the picture's
// width and height, and distances are in these fractions. Knows no elements.

import { counted } from "./words.js";

const CELLS = 100; // in each direction: objects are placed in steps of 0.01
const HALF = 0.0072; // half a cell's diagonal: an area of one point has a cell, too
const SLACK = 0.011; // a place may be that far from what is possible, because of the steps; the service allows 0.02
const ROOMY = 0.22; // objects as far apart as this do not hide each other

const distance = (one, other) => Math.sqrt((one.x - other.x) ** 2 + (one.y - other.y) ** 2);
const room = (place, others) => others.reduce((least, one) => Math.min(least, distance(one, place)), Infinity);
/** The distance of a place to the line between two others, which may be the same. */
const toSegment = (a, b, place) => {
  const [x, y] = [b.x - a.x, b.y - a.y];
  const along = ((place.x - a.x) * x + (place.y - a.y) * y) / (x * x + y * y || 1);
  const share = Math.min(1, Math.max(0, along));
  return distance({ x: a.x + share * x, y: a.y + share * y }, place);
};
const leastBy = (places, cost) => places[places.map(cost).reduce((best, one, i, all) => (one < all[best] ? i : best), 0)];

export class Support {
  /** Of a model from GET /models; one that says nothing about its range refuses nothing. */
  constructor({ support } = {}) {
    const { objects: [low, high] = [1, Infinity], area, nearest } = support ?? {};
    this.low = Math.max(1, low);
    this.high = high;
    this.area = area?.length ? area.map(([x, y]) => ({ x, y })) : null; // corners by increasing angle
    this.nearest = nearest ?? 0;
    const all = Array.from({ length: (CELLS + 1) ** 2 }, (_, i) => ({ x: (i % (CELLS + 1)) / CELLS, y: Math.floor(i / (CELLS + 1)) / CELLS }));
    this.places = all.filter((place) => this.#outside(place) <= HALF);
    const [xs, ys] = [this.places.map(({ x }) => x), this.places.map(({ y }) => y)];
    this.middle = { x: (Math.min(...xs) + Math.max(...xs)) / 2, y: (Math.min(...ys) + Math.max(...ys)) / 2 };
  }

  /** "1 to 10 objects"; empty without a range. */
  get range() {
    if (this.high === Infinity) return "";
    return this.low === this.high ? counted(this.high, "object") : `${this.low} to ${counted(this.high, "object")}`;
  }

  /** Why a picture of so many objects cannot be drawn, or null. */
  countProblem(count) {
    if (count >= this.low && count <= this.high) return null;
    return `${counted(count, "object")}: this model draws ${this.range} in a picture.`;
  }

  /** Return why an object cannot stand at a place while the `others` keep their places. Null if it can. */
  placeProblem(place, others) {
    if (this.#outside(place) > SLACK) return "This model has seen no objects outside the outlined area.";
    if (room(place, others) < this.nearest - SLACK) return "This model has seen no two objects so close to each other.";
    return null;
  }

  /** The possible place that is nearest to `to`, or null. */
  clamp(to, others) {
    const free = this.places.filter((place) => room(place, others) >= this.nearest);
    return leastBy(free, (place) => distance(place, to)) ?? null;
  }

  /** A place for one more object: near the middle, or else where there is most room. */
  free(taken) {
    const roomy = this.places.filter((place) => room(place, taken) >= Math.max(ROOMY, this.nearest));
    return leastBy(roomy, (place) => distance(place, this.middle)) ?? leastBy(this.places, (place) => -room(place, taken));
  }

  /** How far a place is from the area; 0 inside. */
  #outside(place) {
    if (!this.area) return 0;
    const edges = this.area.map((corner, i) => [corner, this.area[(i + 1) % this.area.length]]);
    const isLeft = ([a, b]) => (b.x - a.x) * (place.y - a.y) - (b.y - a.y) * (place.x - a.x) >= 0;
    if (edges.length > 2 && edges.every(isLeft)) return 0;
    return Math.min(...edges.map(([a, b]) => toSegment(a, b, place)));
  }
}

/** The width over the height at which a model's pictures are shown; null for an unknown model. */
export function ratioOf(model) {
  if (!model) return null;
  // A network that draws 4:3 pictures squeezed to squares says so in `proportions`; squeezed, spheres look like eggs.
  const [width, height] = model.config.proportions ?? model.picture ?? [1, 1];
  return width / height;
}

/** How many times wider than stored a model's pictures are shown; 1 for an unknown model. */
export function stretchOf(model) {
  const [width, height] = model?.picture ?? [1, 1];
  return (ratioOf(model) ?? 1) / (width / height);
}
