// Edits a picture by label: objects are dragged, added, removed or recoloured, each change is drawn at once beside the
// picture before it, and the pictures so far are a story that can be undone and downloaded as a strip.

import { Problem, createJob, follow, readPictureInTurn } from "./api.js";
import { announce, find, h, save } from "./dom.js";
import { drawing } from "./labels.js";
import { percent } from "./words.js";

const STEP = 0.05; // of an arrow key
const FINE_STEP = 0.01; // with Shift
const MOVED = 0.01; // less than that is a click
const HINT = "Drag an object to move it, or choose it and use the arrow keys and Enter.";
const GAP = 8; // pixels between the pictures of a strip
const CAPTION = 28; // pixels below them
const WORDS = {
  add: ({ label }) => `add ${label}`,
  remove: ({ label }) => `remove ${label}`,
  move: ({ label }) => `move ${label}`,
  recolour: ({ label, to }) => `${label} to ${to}`,
};

const shapeOf = (label) => label.split(" ").at(-1);
const inWords = (edit) => Object.entries(edit).map(([kind, about]) => WORDS[kind](about)).join(", ");

/** The dialog. Calls `failed(problem)` if the service refuses an edit, and `ended(job)` after each. */
export class Editor {
  constructor({ failed, ended }) {
    Object.assign(this, { failed, ended });
    this.dialog = find("#edit-dialog");
    this.dialog.addEventListener("close", () => this.#leave());
    this.story = []; // {result, source, words}
    this.chosen = null; // label of an object
    this.watch = new AbortController();
  }

  /**
   * Opens a finished picture, its `result` and `source`, a blob: URL. `labels`: all that the model knows; `support` and
   * `ratio` are those of the model.
   */
  open({ result, source }, { labels, support, ratio }) {
    Object.assign(this, { labels, support, ratio });
    this.watch = new AbortController();
    this.story = [{ result, source, words: "as drawn" }];
    this.chosen = null;
    this.drawing = false;
    this.problem = null;
    this.dialog.showModal();
    this.#show();
  }

  get #now() {
    return this.story.at(-1);
  }

  /** The places of the picture's objects: {label: {x, y}}. */
  get #places() {
    const { labels, places } = this.#now.result;
    return Object.fromEntries(labels.map((label, i) => [label, places[i]]));
  }

  #leave() {
    this.watch.abort();
    for (const { source } of this.story.slice(1)) URL.revokeObjectURL(source); // the first one is the card's
    this.story = [];
    this.dialog.replaceChildren();
  }

  #show() {
    const before = this.story.at(-2);
    const side = (words, ...children) => h("figure", {}, h("figcaption", {}, words), ...children);
    this.image = this.#picture(this.#now, `Picture of ${this.#now.result.labels.join(", ")}`);
    this.frame = h("div", { class: "edited" }, this.image, Object.entries(this.#places).map((one) => this.#handle(...one)));
    this.frame.style.aspectRatio = this.ratio;
    this.hint = h("p", { class: "range", id: "edit-hint" });
    this.dialog.replaceChildren(
      h(
        "div",
        { class: "about-head" },
        h("h2", { id: "edit-title" }, "Edit the picture"),
        h("button", { class: "quiet", type: "button", "aria-label": "Close", onclick: () => this.dialog.close() }, "×"),
      ),
      h(
        "div",
        { class: "sides" },
        before ? side("Before", this.#picture(before, "The picture before this edit")) : null,
        side(before ? `After: ${this.#now.words}` : "Picture", this.frame),
      ),
      this.hint,
      this.#controls(),
      h("ol", { class: "story", "aria-label": "Story" }, this.story.map((one) => h("li", { title: one.words }, this.#picture(one, one.words)))),
      h(
        "div",
        { class: "buttons" },
        h("button", { class: "quiet", type: "button", id: "edit-undo", disabled: this.drawing || !before, onclick: () => this.#undo() }, "Undo"),
        h("button", { class: "quiet", type: "button", id: "edit-strip", disabled: this.drawing, onclick: () => this.#download() }, "Download the strip"),
      ),
    );
    this.dialog.toggleAttribute("data-drawing", this.drawing);
    this.#explain(this.problem);
  }

  #picture({ source }, alt) {
    const image = h("img", { src: source, alt, draggable: "false" });
    image.style.aspectRatio = this.ratio;
    return image;
  }

  #controls() {
    const { labels } = this.#now.result;
    const free = this.labels.filter((label) => !labels.includes(label));
    const chosen = labels.includes(this.chosen) ? this.chosen : null;
    const alike = chosen ? [...free].sort((one, other) => (shapeOf(other) === shapeOf(chosen)) - (shapeOf(one) === shapeOf(chosen))) : free;
    const select = (id, words, first, offered, off, act) =>
      h(
        "label",
        { class: "field", for: id },
        h("span", {}, words),
        h(
          "select",
          { id, disabled: off || this.drawing, onchange: ({ target }) => target.value && act(target.value) },
          h("option", { value: "" }, first),
          offered.map((label) => h("option", { value: label }, label)),
        ),
      );
    const full = this.support.countProblem(labels.length + 1);
    const last = this.support.countProblem(labels.length - 1);
    return h(
      "div",
      { class: "edit-controls" },
      select("edit-object", "Object", "choose one", labels, false, (label) => this.#choose(label)),
      select("edit-recolour", "Make it a", chosen ?? "choose an object", alike, !chosen, (to) => this.#draw({ recolour: { label: chosen, to } })),
      h(
        "button",
        { class: "quiet", type: "button", id: "edit-remove", disabled: !chosen || Boolean(last) || this.drawing, title: last, onclick: () => this.#draw({ remove: { label: chosen } }) },
        "Remove",
      ),
      select("edit-add", "Add an object", full ?? "choose a label", free, Boolean(full), (label) => {
        const { x, y } = this.support.free(Object.values(this.#places));
        this.#draw({ add: { label, x, y } });
      }),
    );
  }

  /** A button on an object, by which it is chosen and moved. */
  #handle(label, place) {
    const button = h(
      "button",
      { class: "place", type: "button", "data-label": label, title: label, "aria-pressed": String(label === this.chosen), "aria-describedby": "edit-hint", disabled: this.drawing },
      drawing(label),
    );
    let at = place;
    const others = () => Object.entries(this.#places).filter(([other]) => other !== label).map(([, one]) => one);
    const put = (to) => {
      this.#explain(this.support.placeProblem(to, others()));
      at = this.support.clamp(to, others()) ?? at;
      show();
    };
    const show = () => {
      button.style.left = `${100 * at.x}%`;
      button.style.top = `${100 * at.y}%`;
      button.setAttribute("aria-label", `${label}, ${percent(at.x)} from the left, ${percent(at.y)} from the top`);
    };
    const moved = () => Math.hypot(at.x - place.x, at.y - place.y) > MOVED;
    const drop = () => (moved() ? this.#draw({ move: { label, x: at.x, y: at.y } }) : this.#choose(label));
    let from = null; // where the pointer took hold of it
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      from = { x: event.clientX, y: event.clientY };
    });
    button.addEventListener("pointermove", (event) => {
      if (!button.hasPointerCapture(event.pointerId)) return;
      const box = this.frame.getBoundingClientRect();
      put({ x: place.x + (event.clientX - from.x) / box.width, y: place.y + (event.clientY - from.y) / box.height });
    });
    button.addEventListener("pointerup", drop);
    button.addEventListener("keydown", (event) => {
      const by = event.shiftKey ? FINE_STEP : STEP;
      const [dx, dy] = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key] ?? [];
      if (event.key !== "Enter" && dx === undefined) return;
      event.preventDefault();
      if (event.key === "Enter") return drop();
      put({ x: at.x + dx, y: at.y + dy });
      announce(button.getAttribute("aria-label"));
    });
    show();
    return button;
  }

  #choose(label) {
    this.chosen = label;
    this.#show();
    find("#edit-object").value = label;
    find("#edit-recolour").focus();
  }

  #undo() {
    URL.revokeObjectURL(this.story.pop().source);
    this.problem = null;
    this.#show();
    announce(`Undone. ${this.#now.words}`);
    find(this.story.length > 1 ? "#edit-undo" : "#edit-object").focus();
  }

  /** Draws an edit of the latest picture, with previews, and adds it to the story. */
  async #draw(edit) {
    const { signal } = this.watch;
    this.drawing = true;
    this.problem = null;
    this.#show();
    try {
      const path = this.#now.result.url.replace(/\.png$/, "/edit");
      const job = await createJob(path, { edits: [edit] });
      let end = null;
      const hear = (event, data) => {
        if (event === "steps" && data.pictures[0]?.preview) this.image.src = data.pictures[0].preview;
        if (event === "end") end = data;
      };
      await follow(job.id, hear, signal);
      if (signal.aborted) return;
      this.ended(end);
      if (!end.result) throw new Problem(`The edit ${end.status === "failed" ? `failed: ${end.error}` : "was cancelled"}.`);
      const [result] = end.result.pictures;
      const source = await readPictureInTurn(result.url, signal);
      if (signal.aborted) return URL.revokeObjectURL(source);
      this.story.push({ result, source, words: inWords(edit) });
      this.chosen = edit.recolour?.to ?? (edit.add ?? edit.move)?.label ?? null;
      announce(`Drawn: ${inWords(edit)}. ${result.exact ? "Exact" : "Not exact"}.`);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      this.problem = error.message;
      this.failed(error);
    }
    this.drawing = false;
    this.#show();
    find("#edit-object").value = this.chosen ?? "";
    find("#edit-undo:enabled, #edit-object").focus();
  }

  /** Saves the pictures of the story side by side, each with what was done, as one PNG. */
  async #download() {
    const images = [...this.dialog.querySelectorAll(".story img")];
    await Promise.all(images.map((image) => image.decode()));
    const height = images[0].naturalHeight;
    const width = Math.round(height * this.ratio);
    const canvas = h("canvas", { width: GAP + images.length * (width + GAP), height: GAP + height + CAPTION });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = "#000";
    context.font = `${CAPTION / 2}px system-ui, sans-serif`;
    for (const [i, image] of images.entries()) {
      const left = GAP + i * (width + GAP);
      context.drawImage(image, left, GAP, width, height);
      context.fillText(this.story[i].words, left, GAP + height + 0.7 * CAPTION, width);
    }
    const blob = URL.createObjectURL(await new Promise((resolve) => canvas.toBlob(resolve)));
    save(blob, "story.png");
    setTimeout(() => URL.revokeObjectURL(blob), 10_000);
  }

  #explain(problem) {
    this.hint.textContent = this.drawing ? "Drawing…" : (problem ?? HINT);
    this.hint.toggleAttribute("data-wrong", !this.drawing && Boolean(problem));
  }
}
