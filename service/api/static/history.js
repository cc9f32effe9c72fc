// The gallery of jobs, newest first, one page at a time: search by label, open, download, delete.

import { Problem, deleteJob, readJobs, readPicture } from "./api.js";
import { announce, find, h, save } from "./dom.js";
import { ago, counted } from "./words.js";

const TYPING_MS = 300; // a search begins so long after the last key
const OPEN = ["queued", "running"];
const GRID_PICTURES = 16; // two rows of eight; in a larger grid none can be seen at this size, and it has megabytes

const titleOf = ({ kind, progress }) => (kind === "generate" ? counted(progress.total, "picture") : `Score, ${counted(progress.total, "picture")}`);

/**
 * The jobs as links to their addresses on this page. Calls `attempt(action)` with what calls the service and
 * `deleted(id)` after a job is gone; `stretchOf(job)` is how many times wider its pictures are shown than stored.
 */
export class History {
  constructor({ attempt, deleted, stretchOf }) {
    Object.assign(this, { attempt, deleted, stretchOf });
    this.next = null;
    this.label = "";
    this.asked = 0;
    this.pictures = new Map(); // job -> blob: URL of its thumbnail
    find("#more").onclick = () => attempt(() => this.#page(this.next));
    find("#search").oninput = () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.#search(), TYPING_MS);
    };
  }

  /** Reads the newest jobs again. Throws a Problem if they cannot be read. */
  async refresh() {
    await this.#page(null);
  }

  /** Marks the job that the page shows. */
  mark(id) {
    this.shown = id;
    for (const link of find("#jobs").querySelectorAll("a")) {
      if (link.dataset.job === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  #search() {
    this.label = find("#search").value.trim();
    this.attempt(() => this.refresh());
  }

  async #page(cursor) {
    const asked = ++this.asked;
    let page = await readJobs(cursor, this.label);
    while (!page.jobs.length && page.next) page = await readJobs(page.next, this.label); // the service looks at some jobs at a time
    if (asked !== this.asked) return; // something else was asked for meanwhile
    this.next = page.next;
    const cards = page.jobs.map((job) => this.#card(job));
    if (cursor) find("#jobs").append(...cards);
    else find("#jobs").replaceChildren(...cards);
    this.#tidy();
    if (this.label && !cursor) announce(find("#nothing").textContent || `${counted(page.jobs.length, "job")} found${page.next ? ", and more" : ""}.`);
    this.mark(this.shown);
  }

  #tidy() {
    const isEmpty = !find("#jobs").children.length;
    find("#history").hidden = isEmpty && !this.label;
    find("#nothing").textContent = isEmpty && this.label ? `No job has a label with "${this.label}".` : "";
    find("#more").hidden = !this.next;
  }

  #card(job) {
    const name = `${titleOf(job)}, ${ago(job.created_at)}`;
    const shape = ({ target }) => target.style.setProperty("--ratio", (target.naturalWidth / target.naturalHeight) * this.stretchOf(job));
    const image = h("img", { alt: "", hidden: true, onload: shape });
    const words = job.status === "finished" ? [] : [h("span", { class: "status" }, job.status)];
    const button = (text, action) => h("button", { class: "link", type: "button", "aria-label": `${text}: ${name}`, onclick: action }, text);
    const card = h(
      "li",
      {},
      h(
        "a",
        { href: `#${job.id}`, "data-job": job.id, "data-status": job.status },
        h("span", { class: "thumb" }, image),
        h("span", { class: "job-title" }, titleOf(job), ...words),
        h("span", { class: "meta" }, h("span", {}, ago(job.created_at)), h("span", {}, job.seed === null ? "uploaded" : `seed ${job.seed}`)),
      ),
    );
    const actions = [];
    if (job.status === "finished") {
      this.#picture(job, image);
      actions.push(button("Zip", () => this.attempt(() => this.#download(job))));
    }
    if (!OPEN.includes(job.status)) actions.push(button("Delete", ({ currentTarget }) => this.#delete(job, card, currentTarget)));
    if (actions.length) card.append(h("div", { class: "actions" }, actions));
    return card;
  }

  /** Shows the grid, or the first picture of a large job. */
  async #picture({ id, progress }, image) {
    try {
      const name = progress.total <= GRID_PICTURES ? "grid.png" : "images/0.png";
      if (!this.pictures.has(id)) this.pictures.set(id, await readPicture(`jobs/${id}/${name}`));
      image.src = this.pictures.get(id);
      image.hidden = false;
    } catch (error) {
      if (!(error instanceof Problem)) throw error; // its pictures have expired, and the card stays without one
    }
  }

  async #download({ id }) {
    const blob = await readPicture(`jobs/${id}/pictures.zip`);
    save(blob, `labelgrid-${id.slice(0, 8)}.zip`);
    setTimeout(() => URL.revokeObjectURL(blob), 10_000);
  }

  /** Deletes a job at the second click; leaving the button takes the first one back. */
  #delete(job, card, button) {
    const name = button.getAttribute("aria-label").replace(/^[^:]*: /, "");
    const say = (text) => {
      button.textContent = text;
      button.setAttribute("aria-label", `${text}: ${name}`);
    };
    if (!button.dataset.sure) {
      button.dataset.sure = "true";
      say("Delete for good");
      announce("Press again to delete the job with its pictures.");
      button.onblur = () => {
        delete button.dataset.sure;
        say("Delete");
      };
      return;
    }
    button.onblur = null;
    this.attempt(async () => {
      await deleteJob(job.id);
      const nearest = card.nextElementSibling ?? card.previousElementSibling;
      card.remove();
      URL.revokeObjectURL(this.pictures.get(job.id));
      this.pictures.delete(job.id);
      this.#tidy();
      (nearest?.querySelector("a") ?? (find("#history").hidden ? find("#canvas") : find("#search"))).focus();
      announce("The job is deleted.");
      this.deleted(job.id);
    });
  }
}
