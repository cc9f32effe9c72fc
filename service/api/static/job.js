// The canvas: one job from the queue to its end, with its pictures as they arrive, its scores and its buttons.

import { Problem, cancelJob, follow, readJob, readPicture, readPictureInTurn } from "./api.js";
import { Card } from "./card.js";
import { tile } from "./composer.js";
import { announce, copy, find, h, save } from "./dom.js";
import { Lightbox } from "./lightbox.js";
import { scoreboard } from "./scores.js";
import { clock, counted, generateCommand, lasting, requestOf } from "./words.js";

const OPEN = ["queued", "running"];
const FEW = 6; // pictures that are shown at full size
const MANY = 24; // pictures from which they are shown smaller

export const nameOf = ({ kind, labels, progress }) =>
  kind === "generate"
    ? counted(progress.total, "picture")
    : `Score of ${counted(labels.length, "list")}, ${counted(progress.total / labels.length, "run")}`;

/**
 * Shows one job at a time. Calls `laid()` when another job is on the page, `reuse(job)` to compose it again, `edit(job, card)`
 * to edit one of its pictures and `ended(job)` when it ends; `ratioOf(job)` is the width over the height of its pictures, or null if it is not known.
 */
export class JobView {
  constructor({ laid, reuse, edit, ended, failed, ratioOf }) {
    Object.assign(this, { laid, reuse, ended, failed, ratioOf });
    this.lightbox = new Lightbox((card) => this.#strip(card), (card) => edit(this.job, card));
    this.root = find("#job");
    this.watch = new AbortController();
    this.blobs = [];
    this.cards = [];
    this.id = null;
    this.lost = false; // whether the job could not be read for a reason that may pass
  }

  /** Shows, without a job, an invitation to draw() some pictures. */
  invite(pictures, draw) {
    this.#leave();
    this.root.replaceChildren(
      h(
        "div",
        { class: "empty" },
        h("div", { class: "ghosts", "aria-hidden": "true" }, pictures.map((picture) => tile("span", picture))),
        h("p", {}, "Choose objects for one or many pictures, then draw them."),
        pictures.length ? h("button", { class: "quiet", type: "button", onclick: () => draw(pictures) }, "Or draw these") : null,
      ),
    );
  }

  /** Opens a job by its id, or a new job. */
  async open(idOrJob) {
    const id = idOrJob.id ?? idOrJob;
    if (id === this.id) return;
    this.#leave();
    this.id = id;
    const { signal } = this.watch;
    try {
      const job = idOrJob.id ? idOrJob : await readJob(id);
      if (signal.aborted) return;
      this.#lay(job);
      if (job.result) this.#end(job, signal);
      else await follow(id, (event, data) => this.#hear(event, data, signal), signal); // also of the past, if it ended without
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      this.id = null;
      this.lost = error.mayPass;
      this.root.replaceChildren(h("p", { class: "refusal", role: "alert" }, error.message));
      if (error.status === 401) this.failed(error);
    }
  }

  /** Shows the pictures in their proportions, now that the models are known. */
  reshape() {
    for (const card of this.cards) card.shape(this.ratioOf(this.job));
  }

  #leave() {
    this.watch.abort();
    this.watch = new AbortController();
    this.lightbox.close();
    for (const blob of this.blobs) URL.revokeObjectURL(blob);
    this.blobs = [];
    this.id = null;
    this.lost = false;
  }

  /** Lays out head, progress and a card for each label list; the repeats of a score job share the cards. */
  #lay(job) {
    this.job = job;
    const calls = { enlarge: (card) => this.lightbox.open(this.cards, card, job.trajectory), changed: (card) => this.lightbox.renew(card) };
    this.cards = job.labels.map((labels, index) => new Card(index, labels, calls));
    this.reshape();
    this.eta = job.eta ? job : null; // {ahead, eta}
    this.done = new Set();
    this.parts = new Map(); // index of a picture in progress -> its finished fraction
    this.progress = h("progress", { class: "progress", max: job.progress.total, value: 0, "aria-label": "Finished pictures" });
    this.state = h("p", { class: "meta" });
    this.buttons = h("div", { class: "buttons" });
    this.scores = h("div", {});
    const size = job.labels.length > MANY ? "many" : job.labels.length <= FEW ? "few" : "";
    const grid = h("ol", { class: `cards ${size}` }, this.cards.map((card) => card.element));
    const head = h("header", { class: "job-head" }, h("div", {}, h("h2", {}, nameOf(job)), this.state), this.buttons);
    this.root.replaceChildren(head, this.progress, this.scores, grid);
    this.#showState(job);
    const canBeCancelled = OPEN.includes(job.status);
    this.#offer([canBeCancelled && h("button", { class: "quiet", type: "button", onclick: (event) => this.#cancel(event.target) }, "Cancel")]);
    this.laid();
  }

  #showState(job, news = job.status) {
    const { seed, model, options } = job;
    const status = OPEN.includes(job.status) ? news : job.status; // an ended job's events tell what was before
    const words = {
      queued: this.eta ? `Queued, ${counted(this.eta.ahead, "picture")} ahead` : "Waiting for a worker",
      running: `${this.done.size} of ${job.progress.total} finished`,
      finished: `Done in ${lasting((new Date(job.finished_at) - new Date(job.created_at)) / 1000)}`,
      failed: "Failed",
      cancelled: "Cancelled",
    }[status];
    this.root.dataset.status = status;
    this.status = status;
    const made = options && [`seed ${seed}`, counted(options.steps, "step"), `guidance ${options.guidance}`, options.sampler];
    const due = OPEN.includes(status) && this.eta?.eta && `done at ${clock(this.eta.eta)}`;
    const facts = [words, ...(due ? [due] : []), ...(made ?? ["uploaded pictures"]), model];
    this.state.replaceChildren(...facts.map((fact) => h("span", {}, fact)));
    this.#showProgress();
    this.progress.hidden = !OPEN.includes(status);
  }

  #showProgress() {
    this.progress.value = [...this.parts.values()].reduce((sum, part) => sum + part, this.done.size);
  }

  #offer(buttons) {
    this.buttons.replaceChildren(...buttons.filter(Boolean));
  }

  #hear(event, data, signal) {
    if (signal.aborted) return;
    if (event === "eta" || (event === "job" && data.eta)) this.eta = data;
    if (event === "eta") this.#showState(this.job, this.status);
    if (event === "job" && OPEN.includes(data.status)) this.#showState(data);
    if (event === "status") this.#showState(this.job, data.status);
    if (event === "steps") this.#sampled(data.pictures);
    if (event === "picture") this.#made(data, signal);
    if (event === "end") {
      this.#end(data, signal);
      this.ended(data);
    }
  }

  #sampled(pictures) {
    for (const one of pictures) {
      if (!this.done.has(one.index)) this.parts.set(one.index, one.step / one.steps);
      this.#cardOf(one.index).sample(one);
    }
    this.#showProgress();
  }

  #cardOf(index) {
    return this.cards[index % this.cards.length];
  }

  async #made({ index, url }, signal) {
    this.done.add(index);
    this.parts.delete(index);
    this.#showState(this.job, "running");
    if (this.job.kind === "generate") await this.#picture(this.#cardOf(index), url, signal);
  }

  /** Reads a card's picture, once. */
  #picture(card, url, signal) {
    return (card.reading ??= this.#read(card, url, signal));
  }

  async #read(card, url, signal) {
    try {
      const blob = await readPictureInTurn(url, signal);
      if (signal.aborted) return URL.revokeObjectURL(blob);
      this.blobs.push(blob);
      card.finish(blob);
    } catch (error) {
      if (!signal.aborted && !(error instanceof Problem)) throw error;
      card.reading = null; // the job's end is another occasion
    }
  }

  /** Reads the trajectory of a card's picture; null if its job was requested without. */
  async #strip(card) {
    const url = card.result?.trajectory_url;
    if (!url || card.strip) return card.strip ?? null;
    const { signal } = this.watch;
    try {
      card.strip = await readPictureInTurn(url, signal);
      this.blobs.push(card.strip);
      return card.strip;
    } catch (error) {
      if (!signal.aborted && !(error instanceof Problem)) throw error;
      return null;
    }
  }

  #end(job, signal) {
    this.job = job;
    this.#showState(job);
    const pictures = job.result?.pictures ?? [];
    for (const [index, result] of pictures.entries()) {
      const card = this.cards[index];
      this.#picture(card, result.url, signal).then(() => signal.aborted || card.judge(result));
    }
    if (job.result) this.scores.replaceChildren(scoreboard(job, this.#worst(job, signal)));
    else this.#showUnfinished(job);
    this.#offer([
      job.result && h("button", { class: "primary", type: "button", onclick: () => this.#download(job.result.grid_url, "png") }, "Download grid"),
      job.result && h("button", { class: "quiet", type: "button", onclick: () => this.#download(`jobs/${job.id}/pictures.zip`, "zip") }, "Download zip"),
      job.kind === "generate" && h("button", { class: "quiet", type: "button", onclick: (event) => copy(generateCommand(requestOf(job)), event.target) }, "Copy as curl"),
      job.options && h("button", { class: "quiet", type: "button", onclick: () => this.reuse(job) }, "Edit as new"),
    ]);
    announce(this.#spoken(job));
  }

  /** The pictures of all runs that differ most from what was asked for. They are read once somebody opens them. */
  #worst(job, signal) {
    const worst = job.result.worst ?? [];
    if (!worst.length) return null;
    const calls = { enlarge: (card) => this.lightbox.open(cards, card, null), changed: (card) => this.lightbox.renew(card) };
    const cards = worst.map((result, index) => new Card(index, result.labels, calls));
    const grid = h("ol", { class: "cards many" });
    const read = () => {
      grid.replaceChildren(...cards.map((card) => card.element));
      for (const [index, card] of cards.entries()) {
        card.shape(this.ratioOf(job));
        this.#picture(card, worst[index].url, signal).then(() => signal.aborted || card.judge(worst[index]));
      }
    };
    return h("details", { class: "more", ontoggle: read }, h("summary", {}, "Worst pictures"), grid);
  }

  /** Shows a failed or cancelled job, which keeps the pictures that it finished. */
  #showUnfinished(job) {
    const words = job.status === "failed" ? `The job failed: ${job.error ?? "no reason was given"}` : "The job was cancelled.";
    this.scores.replaceChildren(h("p", { class: job.status === "failed" ? "refusal" : "note" }, words));
    for (const card of this.cards) Promise.resolve(card.reading).then(() => card.abandon());
  }

  #spoken(job) {
    if (!job.result) return `${nameOf(job)}: ${job.status}.`;
    const exact = job.result.pictures.filter((picture) => picture.exact).length;
    return `${nameOf(job)}, finished. ${exact} of ${job.result.pictures.length} exact.`;
  }

  async #cancel(button) {
    button.disabled = true;
    try {
      await cancelJob(this.id);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.status !== 409) button.disabled = false; // with 409 the job has ended, and its end event follows
      this.failed(error);
    }
  }

  async #download(path, suffix) {
    try {
      const blob = await readPicture(path, this.watch.signal);
      save(blob, `labelgrid-${this.job.id.slice(0, 8)}.${suffix}`);
      setTimeout(() => URL.revokeObjectURL(blob), 10_000);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      this.failed(error);
    }
  }
}
