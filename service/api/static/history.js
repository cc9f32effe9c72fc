// The gallery of jobs, newest first, one page at a time: open, download, delete.

import { Problem, deleteJob, readJobs, readPicture } from "./api.js";
import { announce, find, h, save } from "./dom.js";
import { counted, when } from "./words.js";

const OPEN = ["queued", "running"];
const GONE = [404, 410];
const PAGE = 12;
const LONGEST_PAGE = 100; // that the service gives
const GRID_PICTURES = 16; // two rows of eight; in a larger grid none can be seen at this size, and it has megabytes

const titleOf = ({ kind, progress }) => (kind === "generate" ? counted(progress.total, "picture") : `Score, ${counted(progress.total, "picture")}`);

/** Removes a card with its thumbnail, which the browser would keep as long as the page is open. */
function discard(card) {
  card.remove();
  URL.revokeObjectURL(card.querySelector("img").src);
}

/**
 * The jobs as links to their addresses on this page. Calls `attempt(action)` with what calls the service and
 * `deleted(id)` after a job is gone; `stretchOf(job)` is how many times wider its pictures are shown than stored.
 */
export class History {
  constructor({ attempt, deleted, stretchOf }) {
    Object.assign(this, { attempt, deleted, stretchOf });
    this.next = null;
    this.asked = 0;
    this.cards = new Map(); // job -> its card
    find("#more").onclick = () => attempt(() => this.#page(PAGE, this.next));
  }

  /** Reads the newest jobs again, as many as are shown. Throws a Problem if they cannot be read. */
  async refresh() {
    await this.#page(Math.max(PAGE, this.cards.size), null, this.cards.size);
  }

  /** Whether a job was open when it was read, or its picture could not be read for a reason that may pass. */
  get isStale() {
    return find("#jobs").querySelector("[data-status=queued], [data-status=running], [data-lost]") !== null;
  }

  /** Marks the job that the page shows. */
  mark(id) {
    this.shown = id;
    for (const link of find("#jobs").querySelectorAll("a")) {
      if (link.dataset.job === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  /** Reads and shows up to `most` jobs, at least `least` if there are as many. */
  async #page(most, cursor = null, least = 1) {
    const asked = ++this.asked;
    const jobs = [];
    let next = cursor;
    do {
      const page = await readJobs(Math.min(most - jobs.length, LONGEST_PAGE), next);
      if (asked !== this.asked) return; // something else was asked for meanwhile
      jobs.push(...page.jobs);
      next = page.next;
    } while (jobs.length < least && next); // a page leaves out jobs that have expired
    this.next = next;
    this.#show(cursor ? [...this.cards] : [], jobs);
  }

  /** Shows cards and, after them, more jobs. The card of a job that is as before stays, with the focus or a first click in it. */
  #show(cards, jobs) {
    const before = this.cards;
    const focused = [...before].find(([, card]) => card.contains(document.activeElement))?.[0];
    const statusOf = (card) => card?.querySelector("a").dataset.status;
    const isKept = (job, card) => statusOf(card) === job.status && !card.querySelector("[data-lost]");
    const cardOf = (job) => (isKept(job, before.get(job.id)) ? before.get(job.id) : this.#card(job));
    this.cards = new Map([...cards, ...jobs.map((job) => [job.id, cardOf(job)])]);
    for (const [id, card] of before) if (this.cards.get(id) !== card) discard(card);
    const list = find("#jobs");
    for (const [i, card] of [...this.cards.values()].entries()) {
      if (list.children[i] !== card) list.insertBefore(card, list.children[i] ?? null);
    }
    if (focused && !list.contains(document.activeElement)) this.cards.get(focused)?.querySelector("a").focus();
    this.#tidy();
    this.mark(this.shown);
  }

  #tidy() {
    find("#history").hidden = !find("#jobs").children.length && !this.next;
    find("#more").hidden = !this.next;
  }

  #card(job) {
    const name = `${titleOf(job)}, ${when(job.created_at)}`;
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
        h("span", { class: "meta" }, h("span", {}, when(job.created_at)), h("span", {}, job.seed === null ? "uploaded" : `seed ${job.seed}`)),
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
      image.src = await readPicture(`jobs/${id}/${name}`);
      image.hidden = false;
      if (!image.isConnected) URL.revokeObjectURL(image.src);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      image.toggleAttribute("data-lost", error.mayPass); // otherwise its pictures have expired
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
      await deleteJob(job.id).catch((problem) => {
        if (!GONE.includes(problem.status)) throw problem; // otherwise another tab did it, or the answer was lost
      });
      const nearest = card.nextElementSibling ?? card.previousElementSibling;
      this.cards.delete(job.id);
      discard(card);
      this.#tidy();
      (nearest?.querySelector("a") ?? find("#canvas")).focus();
      announce("The job is deleted.");
      this.deleted(job.id);
      if (!this.cards.size && this.next) await this.#page(PAGE);
    });
  }
}
