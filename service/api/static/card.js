// One picture: its progress, and the verdict on each of its objects.

import { h } from "./dom.js";
import { drawing, listed } from "./labels.js";
import { percent, tenths } from "./words.js";

const FOUND = 0.5; // a label with a higher probability counts as found, as in the evaluator's `exact`
const MARKS = { right: "✓", missing: "✕", extra: "+" };
const WORDS = { right: "right", missing: "missing", extra: "not asked for" };

/**
 * The evaluator's verdicts on a picture: [{label, verdict: right | missing | extra, probability, distance}]. `distance`
 * from the place asked for, in fractions of the picture's width, where a place was asked for.
 */
export function verdicts({ labels, scores, distances }) {
  const asked = labels.map((label, index) => {
    const probability = scores[label];
    return { label, probability, distance: distances?.[index], verdict: probability > FOUND ? "right" : "missing" };
  });
  const extra = Object.entries(scores)
    .filter(([label, probability]) => probability > FOUND && !labels.includes(label))
    .map(([label, probability]) => ({ label, probability, verdict: "extra" }));
  return [...asked, ...extra];
}

/** "1.2 % of the width" */
export const distanceWords = (distance) => `${tenths(distance)} of the width`;

/** A line for one object: drawing, name, distance from its place, and the verdict, where there is one. */
export function objectLine({ label, verdict, probability, distance }) {
  return h(
    "li",
    { class: "object", "data-verdict": verdict ?? null },
    drawing(label),
    h("span", { class: "object-name" }, label),
    typeof distance === "number"
      ? [
          h("span", { class: "unseen" }, `, ${distanceWords(distance)} from its place`),
          h("span", { class: "distance", "aria-hidden": "true", title: `${distanceWords(distance)} from its place` }, `${tenths(distance)} off`),
        ]
      : null,
    verdict
      ? [
          h("span", { class: "unseen" }, `: ${WORDS[verdict]}, probability `),
          h("span", { class: "probability" }, percent(probability)),
          h("span", { class: "mark", "aria-hidden": "true", title: WORDS[verdict] }, MARKS[verdict]),
        ]
      : null,
  );
}

/** A card of the grid; calls `enlarge(card)` when its picture is clicked, `changed(card)` after its picture or verdict changed. */
export class Card {
  constructor(index, labels, { enlarge, changed }) {
    Object.assign(this, { index, labels, changed });
    this.source = null; // a blob: or data: URL
    this.made = false;
    this.reading = null; // resolves once its picture is here
    this.result = null;
    this.known = null; // width over height, of the model's pictures
    this.image = h("img", { alt: "", hidden: true, draggable: "false", onload: () => this.#loaded() });
    this.bar = h("span", { class: "bar" });
    this.frame = h(
      "button",
      { class: "frame", type: "button", disabled: true, onclick: () => enlarge(this) },
      this.image,
      this.bar,
    );
    this.lines = h("ul", { class: "objects" }, labels.map((label) => objectLine({ label })));
    this.element = h("li", { class: "card", "data-state": "waiting" }, this.frame, this.lines);
    this.#name();
  }

  /** Shows the picture at a ratio of width over height, or, for null, at its own. */
  shape(ratio) {
    this.known = ratio;
    if (this.ratio) this.frame.style.aspectRatio = this.ratio;
  }

  /** Width over height at which the picture is shown; null if that is not known yet. */
  get ratio() {
    const { naturalWidth, naturalHeight } = this.image;
    return this.known ?? (naturalHeight ? naturalWidth / naturalHeight : null);
  }

  /** Shows the preview of a step. */
  sample({ step, steps, preview, attempt }) {
    if (this.made) return;
    this.element.dataset.state = "sampling";
    this.frame.title = attempt > 1 ? `Attempt ${attempt}` : "";
    this.bar.style.setProperty("--part", step / steps);
    if (preview) this.#draw(preview);
  }

  /** Shows the finished picture. */
  finish(source) {
    this.made = true;
    this.element.dataset.state = "made";
    this.frame.title = "";
    if (source) this.#draw(source);
    this.#name();
  }

  judge(result) {
    this.result = result;
    this.labels = result.labels; // an edited picture has others than those that its job begins with
    this.image.alt = `Picture of ${listed(this.labels)}`;
    this.element.dataset.state = result.exact ? "exact" : "judged";
    this.lines.replaceChildren(...verdicts(result).map(objectLine));
    this.#name();
    this.changed(this);
  }

  /** Shows that the job ended without this picture. */
  abandon() {
    if (this.made) return;
    this.element.dataset.state = "abandoned";
    this.frame.disabled = true;
    this.#name();
  }

  #loaded() {
    this.shape(this.known);
    this.changed(this);
  }

  #draw(source) {
    this.source = source;
    this.image.src = source;
    this.image.hidden = false;
    this.frame.disabled = false;
    this.image.alt = `Picture of ${listed(this.labels)}`;
  }

  #name() {
    const state = { waiting: ", not finished yet", sampling: ", not finished yet", abandoned: ", not finished", exact: ", exact", judged: ", not exact" };
    const selected = this.result?.kept ? `, selected, attempt ${this.result.kept}` : "";
    const verdict = `${state[this.element.dataset.state] ?? ""}${selected}`;
    this.frame.setAttribute("aria-label", `Picture ${this.index + 1}: ${listed(this.labels)}${verdict}. Enlarge`);
  }
}
