// The list of jobs, newest first, one page at a time.

import { Problem, readJobs, readPicture } from "./api.js";
import { find, h } from "./dom.js";
import { ago, counted } from "./words.js";

const titleOf = ({ kind, progress }) => (kind === "generate" ? counted(progress.total, "picture") : `Score, ${counted(progress.total, "picture")}`);

/** The jobs as links to their addresses on this page; calls `more()` for older ones; `ratioOf(job)` as in JobView. */
export class History {
  constructor(more, ratioOf) {
    this.ratioOf = ratioOf;
    this.next = null;
    this.pictures = new Map(); // job -> blob: URL of its first picture
    find("#more").onclick = more;
  }

  /** Reads the newest jobs again. Throws a Problem if they cannot be read. */
  async refresh() {
    await this.#page(null);
  }

  async older() {
    await this.#page(this.next);
  }

  /** Marks the job that the page shows. */
  mark(id) {
    this.shown = id;
    for (const link of find("#jobs").querySelectorAll("a")) {
      if (link.dataset.job === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  async #page(cursor) {
    const { jobs, next } = await readJobs(cursor);
    this.next = next;
    const lines = jobs.map((job) => this.#line(job));
    if (cursor) find("#jobs").append(...lines);
    else find("#jobs").replaceChildren(...lines);
    find("#history").hidden = !find("#jobs").children.length;
    find("#more").hidden = !next;
    this.mark(this.shown);
  }

  #line(job) {
    const image = h("img", { alt: "", hidden: true });
    image.style.aspectRatio = this.ratioOf(job) ?? "auto";
    const words = job.status === "finished" ? [] : [h("span", { class: "status" }, job.status)];
    if (job.status === "finished") this.#picture(job.id, image);
    return h(
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
  }

  async #picture(id, image) {
    try {
      if (!this.pictures.has(id)) this.pictures.set(id, await readPicture(`jobs/${id}/images/0.png`));
      image.src = this.pictures.get(id);
      image.hidden = false;
    } catch (error) {
      if (!(error instanceof Problem)) throw error; // its pictures have expired, and the line stays without one
    }
  }
}
