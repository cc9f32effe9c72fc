// An enlarged picture with the evaluator's probabilities; arrow keys go to its neighbours.

import { distanceWords, objectLine, verdicts } from "./card.js";
import { find, h, save } from "./dom.js";
import { figure, percent } from "./words.js";

const ENLARGED = 2; // times the picture's pixels
const LEAST_HEIGHT = 256; // pixels, of small pictures

/**
 * The dialog that shows one of `cards`. `stripOf(card)` reads its trajectory: a URL, or null. `edit(card)` opens a picture
 * whose objects have places to edit it.
 */
export class Lightbox {
  constructor(stripOf, edit) {
    Object.assign(this, { stripOf, edit });
    this.dialog = find("#picture-dialog");
    this.cards = [];
    this.at = 0;
    this.dialog.addEventListener("keydown", (event) => {
      const { target } = event;
      if (target.matches(".way") && target.scrollWidth > target.clientWidth) return; // they scroll it
      if (event.key === "ArrowRight") this.#show(this.at + 1);
      if (event.key === "ArrowLeft") this.#show(this.at - 1);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // the backdrop
    });
  }

  /** Shows a card; `stages`: of each picture's trajectory, if requested. */
  open(cards, card, stages) {
    this.cards = cards;
    this.stages = stages;
    this.dialog.showModal();
    this.#show(cards.indexOf(card));
  }

  /** Shows a card as it is now, if it is the one on show. */
  renew(card) {
    if (!this.dialog.open || card !== this.cards[this.at]) return;
    if (!card.made) return this.dialog.querySelector(".large").replaceWith(this.#large(card)); // a preview: the rest stays
    const buttons = () => [...this.dialog.querySelectorAll("button")];
    const held = buttons().indexOf(document.activeElement);
    this.#show(this.at);
    buttons()[held]?.focus();
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }

  #show(at) {
    const card = this.cards[at];
    if (!card?.source) return;
    this.at = at;
    const title = `Picture ${card.index + 1}`;
    const step = (by, words, sign) =>
      h("button", { class: "quiet", type: "button", "aria-label": words, disabled: !this.cards[at + by]?.source, onclick: () => this.#show(at + by) }, sign);
    const way = h("div", { class: "way", tabindex: 0, role: "group", "aria-label": "From noise to picture", hidden: true });
    this.dialog.setAttribute("aria-label", `${title}: ${card.image.alt}`);
    this.dialog.replaceChildren(
      this.#large(card),
      h(
        "div",
        { class: "about" },
        h(
          "div",
          { class: "about-head" },
          h("h2", {}, title, h("span", { class: "of" }, ` of ${this.cards.length}`)),
          h("button", { class: "quiet", type: "button", "aria-label": "Close", onclick: () => this.dialog.close() }, "×"),
        ),
        h("ul", { class: "objects" }, (card.result ? verdicts(card.result) : card.labels.map((label) => ({ label }))).map(objectLine)),
        card.result ? this.#about(card.result) : null,
        h(
          "div",
          { class: "buttons" },
          step(-1, "Previous picture", "←"),
          step(1, "Next picture", "→"),
          card.result?.places ? h("button", { class: "quiet", type: "button", onclick: () => this.edit(card) }, "Edit") : null,
          card.made ? h("button", { class: "quiet", type: "button", onclick: () => save(card.source, `picture-${card.index + 1}.png`) }, "Download") : null,
        ),
      ),
      way,
    );
    this.dialog.focus(); // the focused button was replaced, and arrow keys must keep working
    this.#showWay(card, way);
  }

  /** The picture, enlarged no further than it stays clear. */
  #large({ image, source, ratio }) {
    const large = h("img", { class: "large", src: source, alt: image.alt });
    large.style.setProperty("--ratio", ratio);
    large.style.setProperty("--height", `${Math.max(ENLARGED * image.naturalHeight, LEAST_HEIGHT)}px`);
    return large;
  }

  async #showWay(card, way) {
    const strip = await this.stripOf(card);
    if (!strip) return;
    const image = h("img", { src: strip, alt: `From noise to the ${card.image.alt.toLowerCase()}` });
    image.style.aspectRatio = this.stages * card.ratio;
    way.replaceChildren(image);
    way.hidden = false;
  }

  #about({ labels, scores, accuracy, f1, distances, kept, attempts }) {
    const known = distances?.filter((distance) => distance !== null) ?? [];
    const mean = known.reduce((sum, distance) => sum + distance, 0) / known.length;
    const shown = new Set([...labels, ...Object.keys(scores).filter((label) => scores[label] > 0.5)]);
    const others = Object.entries(scores).filter(([label]) => !shown.has(label));
    others.sort(([, one], [, other]) => other - one); // the service does, but an object has labels such as "7" first
    return h(
      "dl",
      { class: "facts" },
      h("dt", {}, "Accuracy"),
      h("dd", {}, figure(accuracy)),
      h("dt", {}, "F1"),
      h("dd", {}, figure(f1)),
      kept ? [h("dt", {}, "Selected"), h("dd", {}, `attempt ${kept}${attempts ? ` of ${attempts.length}` : ""}`)] : null,
      known.length ? [h("dt", {}, "Mean distance"), h("dd", {}, distanceWords(mean))] : null,
      others.length ? [h("dt", {}, "Next most likely"), h("dd", {}, `${others[0][0]}, ${percent(others[0][1])}`)] : null,
    );
  }
}
