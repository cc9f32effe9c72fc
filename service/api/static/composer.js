// Composes a request: a strip of pictures, a picker for the objects of the selected one, and their places.
// Knows labels as names, and nothing about the API.

import { announce, find, h } from "./dom.js";
import { drawing, layout, listed } from "./labels.js";
import { Places, placed, placesProblem } from "./places.js";
import { Support } from "./support.js";
import { counted } from "./words.js";

const FILTER_FROM = 30; // labels, from which a search field helps
const SHOWN_IN_TILE = 4;
const RANDOM_PICTURES = 8;
const RANDOM_OBJECTS = 3; // different numbers of objects, from the fewest that the model draws

const EMPTY = { labels: [], places: null };

/**
 * The pictures being composed: {labels, places}, with places {label: {x, y}}, or null to leave them to chance.
 * Calls `changed()` after each change.
 */
export class Composer {
  constructor(changed) {
    this.pictures = [EMPTY];
    this.active = 0;
    this.labels = [];
    this.support = new Support();
    this.placeable = false; // whether the model takes layouts
    this.ratio = 1; // of its pictures, width over height
    this.changed = changed;
    this.places = new Places((label, place) => this.#move(label, place));
    find("#place").onclick = () => this.#place();
    find("#random").onclick = () => this.load(this.atRandom());
    find("#clear").onclick = () => this.#set([EMPTY], 0);
    find("#duplicate").onclick = () => this.#insert(this.pictures[this.active]);
    find("#remove").onclick = () => this.#remove();
    find("#filter").oninput = () => this.#filter();
    find("#picker").addEventListener("keydown", (event) => this.#moveInPicker(event));
    find("#strip").addEventListener("keydown", (event) => this.#moveInStrip(event));
  }

  /**
   * Offers another model's vocabulary and drops objects that it does not have. What its `support` excludes stays, and
   * is marked. `placeable`: the model takes layouts; `ratio`: its pictures' width over height.
   */
  offer(labels, { support, placeable, ratio }) {
    if (labels.join("\n") !== this.labels.join("\n")) {
      this.labels = labels;
      this.#drawPicker();
    }
    Object.assign(this, { support, placeable, ratio });
    this.#set(this.pictures.map((picture) => this.#with(picture, picture.labels)), this.active);
  }

  /** Loads the label lists and layouts of a job. */
  load(lists, layouts = null) {
    const pictures = lists.map((labels, index) => {
      const points = layouts?.[index];
      return this.#with({ places: points && Object.fromEntries(labels.map((label, i) => [label, points[i]])) }, labels);
    });
    this.#set(pictures, 0);
  }

  /** The fields of a request: `labels`, and `layouts` if places were chosen. */
  asked() {
    const full = this.pictures.filter(({ labels }) => labels.length);
    const labels = full.map((picture) => picture.labels);
    if (!this.placeable || full.every(({ places }) => !places)) return { labels };
    const layouts = full.map((picture) => picture.places && picture.labels.map((label) => picture.places[label]));
    return { labels, layouts };
  }

  /** A picture with other labels, without unknown ones; known labels keep their places. */
  #with({ places }, labels) {
    const known = labels.filter((label) => this.labels.includes(label));
    return { labels: known, places: places && placed(known, this.support, places) };
  }

  /** Eight pictures of few objects; none until labels are known. */
  atRandom() {
    return this.labels.length ? randomPictures(this.labels, this.support) : [];
  }

  /** The first picture that the model cannot draw, {index, words}, or null. */
  problem() {
    const found = this.pictures.map((picture, index) => ({ index, words: this.#problemOf(picture) }));
    return found.find(({ words }) => words) ?? null;
  }

  #problemOf({ labels, places }) {
    if (!labels.length) return null; // it is not requested
    return this.support.countProblem(labels.length) ?? (this.placeable && places ? placesProblem(places, this.support) : null);
  }

  /** Selects a picture. */
  choose(index) {
    this.#set(this.pictures, index);
  }

  /** Selects the picture of an entry of the request, which has no empty pictures, and returns its index. */
  chooseAsked(entry) {
    const asked = [...this.pictures.keys()].filter((index) => this.pictures[index].labels.length);
    this.choose(asked[entry] ?? this.active);
    return this.active;
  }

  #set(pictures, active) {
    this.pictures = pictures;
    this.active = Math.min(active, pictures.length - 1);
    this.#show();
    this.changed();
  }

  #insert(picture) {
    this.#set([...this.pictures.slice(0, this.active + 1), picture, ...this.pictures.slice(this.active + 1)], this.active + 1);
  }

  #add() {
    this.#set([...this.pictures, EMPTY], this.pictures.length);
    find("#picker [tabindex='0']")?.focus();
  }

  #remove() {
    const left = this.pictures.filter((_, index) => index !== this.active);
    this.#set(left.length ? left : [EMPTY], Math.max(0, this.active - (this.active === left.length ? 1 : 0)));
  }

  #toggle(label) {
    const picture = this.pictures[this.active];
    const { labels } = picture;
    if (!labels.includes(label) && labels.length >= this.support.high) return announce(find("#range").textContent);
    const after = labels.includes(label) ? labels.filter((one) => one !== label) : [...labels, label];
    this.#set(this.pictures.with(this.active, this.#with(picture, after)), this.active);
  }

  /** Gives the objects of the picture places, or leaves them to chance again. */
  #place() {
    const { labels, places } = this.pictures[this.active];
    this.#set(this.pictures.with(this.active, { labels, places: places ? null : placed(labels, this.support) }), this.active);
  }

  #move(label, place) {
    const { labels, places } = this.pictures[this.active];
    this.pictures = this.pictures.with(this.active, { labels, places: { ...places, [label]: place } });
    this.#markTiles();
    this.changed();
  }

  #show() {
    const strip = find("#strip");
    const focused = strip.contains(document.activeElement);
    const tiles = this.pictures.map(({ labels }, index) => h("li", {}, this.#tile(labels, index)));
    const add = h("button", { class: "tile add", type: "button", onclick: () => this.#add(), "aria-label": "Add a picture" }, "+");
    strip.replaceChildren(...tiles, h("li", {}, add));
    const current = strip.querySelector("[aria-current]");
    if (focused) current.focus();
    keepInView(strip, current);
    const { labels: chosen, places } = this.pictures[this.active];
    const several = this.pictures.length > 1;
    find("#picker-title").textContent = several ? `Objects in picture ${this.active + 1}` : "Objects";
    find("#chosen").textContent = chosen.length ? listed(chosen) : "Nothing chosen yet.";
    find("#remove").disabled = !several && !chosen.length;
    this.#showRange(chosen.length);
    this.places.show(places ?? {}, this.support, this.ratio);
    find("#places-block").hidden = !this.placeable || !chosen.length;
    find("#places").hidden = find("#places-hint").hidden = !places;
    find("#place").textContent = places ? "Leave to chance" : "Choose";
    for (const button of find("#picker").querySelectorAll("button")) {
      const pressed = chosen.includes(button.dataset.label);
      button.setAttribute("aria-pressed", pressed);
      button.setAttribute("aria-disabled", !pressed && chosen.length >= this.support.high);
    }
    this.#markTiles();
  }

  /** Says how many objects the model draws, and why the picture's number is not possible. */
  #showRange(count) {
    const { range, high } = this.support;
    const problem = count ? this.support.countProblem(count) : null;
    const usual = count === high ? `${counted(high, "object")}: this model draws no more in a picture.` : range && `${range} in a picture.`;
    find("#range").textContent = problem ?? usual;
    find("#range").toggleAttribute("data-wrong", problem !== null);
  }

  /** Marks the tiles of pictures that the model cannot draw. */
  #markTiles() {
    for (const [index, tile] of find("#strip").querySelectorAll(".tile:not(.add)").entries()) {
      const words = this.#problemOf(this.pictures[index]);
      tile.toggleAttribute("data-wrong", words !== null);
      tile.title = words ?? "";
      tile.setAttribute("aria-label", [this.#nameOf(index), words].filter(Boolean).join(". "));
    }
  }

  #nameOf(index) {
    const { labels } = this.pictures[index];
    return `Picture ${index + 1}: ${labels.length ? listed(labels) : "empty"}`;
  }

  #tile(labels, index) {
    const current = index === this.active;
    return tile("button", labels, {
      type: "button",
      "aria-current": current ? "true" : null,
      tabindex: current ? 0 : -1,
      onclick: () => this.#set(this.pictures, index),
    });
  }

  #drawPicker() {
    const { visual, groups } = layout(this.labels);
    const picker = find("#picker");
    picker.className = visual ? "picker visual" : "picker";
    picker.replaceChildren(
      ...groups.map(({ name, labels }) =>
        h(
          "div",
          { class: "group", role: "group", "aria-label": name || "labels" },
          name ? h("span", { class: "group-name", "aria-hidden": "true" }, name) : null,
          labels.map(({ label, text }) => this.#choice(label, text, visual)),
        ),
      ),
    );
    picker.querySelector("button")?.setAttribute("tabindex", 0);
    find("#filter").hidden = this.labels.length < FILTER_FROM;
    find("#filter").value = "";
  }

  #choice(label, text, visual) {
    const attributes = {
      class: "choice",
      type: "button",
      "data-label": label,
      "aria-label": label,
      "aria-pressed": "false",
      tabindex: -1,
      title: visual ? label : null,
      onclick: () => this.#toggle(label),
    };
    const picture = drawing(label);
    const letters = picture.classList.contains("letters");
    return h("button", attributes, letters ? null : picture, visual ? null : h("span", {}, text));
  }

  #filter() {
    const words = find("#filter").value.trim().toLowerCase();
    for (const button of find("#picker").querySelectorAll("button")) {
      button.hidden = !button.dataset.label.toLowerCase().includes(words);
    }
    for (const group of find("#picker").querySelectorAll(".group")) {
      group.hidden = !group.querySelector("button:not([hidden])");
    }
    roveTo(find("#picker"), find("#picker button:not([hidden])"), false);
  }

  /** Moves through the objects by arrow keys: left and right within a group, up and down between groups. */
  #moveInPicker(event) {
    const groups = [...find("#picker").querySelectorAll(".group:not([hidden])")].map((group) => [
      ...group.querySelectorAll("button:not([hidden])"),
    ]);
    const row = groups.findIndex((group) => group.includes(document.activeElement));
    if (row < 0) return;
    const column = groups[row].indexOf(document.activeElement);
    const flat = groups.flat();
    const at = flat.indexOf(document.activeElement);
    const target = {
      ArrowRight: flat[at + 1],
      ArrowLeft: flat[at - 1],
      ArrowDown: groups[row + 1]?.[Math.min(column, groups[row + 1].length - 1)],
      ArrowUp: groups[row - 1]?.[Math.min(column, groups[row - 1].length - 1)],
      Home: groups[row][0],
      End: groups[row].at(-1),
    }[event.key];
    if (!target) return;
    event.preventDefault();
    roveTo(find("#picker"), target, true);
  }

  #moveInStrip(event) {
    const last = this.pictures.length - 1;
    const index = { ArrowRight: this.active + 1, ArrowLeft: this.active - 1, Home: 0, End: last }[event.key];
    if (event.key === "Delete" || event.key === "Backspace") this.#remove();
    else if (index >= 0 && index <= last) this.#set(this.pictures, index);
    else return;
    event.preventDefault();
  }
}

/** A small square with a picture's objects. */
export function tile(tag, labels, attributes = {}) {
  const more = labels.length - SHOWN_IN_TILE;
  const shown = labels.slice(0, more > 0 ? SHOWN_IN_TILE - 1 : SHOWN_IN_TILE).map(drawing);
  return h(
    tag,
    { class: "tile", "data-objects": Math.min(labels.length, SHOWN_IN_TILE), ...attributes },
    shown,
    more > 0 ? h("span", { class: "more", "aria-hidden": "true" }, `+${more + 1}`) : null,
  );
}

/** Makes `target` the element of its group that Tab reaches. */
function roveTo(container, target, focus) {
  if (!target) return;
  container.querySelector("[tabindex='0']")?.setAttribute("tabindex", -1);
  target.setAttribute("tabindex", 0);
  if (focus) target.focus();
}

/** Scrolls the strip only; scrollIntoView would also move the page. */
function keepInView(strip, tile) {
  const top = tile.offsetTop - strip.offsetTop;
  const bottom = top + tile.offsetHeight;
  if (top < strip.scrollTop) strip.scrollTop = top;
  else if (bottom > strip.scrollTop + strip.clientHeight) strip.scrollTop = bottom - strip.clientHeight;
}

function randomPictures(labels, { low, high }) {
  const sizes = Math.min(RANDOM_OBJECTS, high - low + 1);
  return Array.from({ length: RANDOM_PICTURES }, (_, index) => {
    const pool = [...labels];
    const count = Math.min(low + (index % sizes), pool.length);
    return Array.from({ length: count }, () => pool.splice(Math.floor(Math.random() * pool.length), 1)[0]);
  });
}
