// The fields for seed, steps, guidance, stages, repeats, sampler and model. Limits and defaults come from the OpenAPI
// document and the model; an empty field is not sent and means the model's default. Options of a job without a field are
// kept when it is edited as new, and listed below the fields.

import { find, h } from "./dom.js";
import { counted, recipeOf } from "./words.js";

const NUMBERS = ["seed", "steps", "guidance", "trajectory", "attempts", "repeats"];
const ONLY = { trajectory: "draw", attempts: "draw", repeats: "score" }; // fields of one mode only
const CHOICES = ["sampler", "model"];
const KEPT = {
  spacing: (name) => `spacing ${name}`,
  guidance_interval: ([low, high]) => `guidance from ${low} to ${high} of T`,
  eta: (eta) => `eta ${eta}`,
  edits: (edits) => counted(edits.length, "edit"),
  clip_x0: (on) => (on ? "x0 clipped" : "x0 not clipped"),
  columns: (n) => `${counted(n, "column")} in the grid`,
};

const elsewhere = (name, mode) => name in ONLY && ONLY[name] !== mode;

/** The fields of the options; calls `changed()` after each change, `modelChanged(choice)` after another model. */
export class Options {
  constructor(changed, modelChanged) {
    this.models = [];
    this.defaults = {};
    this.kept = {}; // a job's options without a field
    this.first = 0; // position of a job's first picture
    for (const name of [...NUMBERS, ...CHOICES]) find(`#${name}`).addEventListener("input", changed);
    for (const name of ["seed", "sampler"]) find(`#${name}`).addEventListener("input", () => this.#showKept());
    find("#kept-drop").addEventListener("click", () => {
      this.#keep({}, 0);
      find("#steps").focus();
      changed();
    });
    find("#model").addEventListener("input", () => {
      this.#showDefaults();
      modelChanged(this.choice);
    });
  }

  /** Reads limits, defaults and samplers from the OpenAPI document. */
  describe({ components: { schemas } }) {
    const own = schemas.SamplingOptions.properties;
    for (const name of ["sampler", "steps", "guidance"]) this.defaults[name] = own[name].default;
    for (const name of ["steps", "guidance"]) find(`#${name}`).max = own[name].maximum;
    const asked = schemas.GenerateRequest.properties;
    this.columns = asked.columns.default;
    find("#seed").max = asked.seed.anyOf[0].maximum;
    const { minimum, maximum } = asked.trajectory.anyOf[0];
    Object.assign(find("#trajectory"), { min: minimum, max: maximum });
    find("#attempts").max = asked.attempts.anyOf[0].maximum;
    this.samplers = own.sampler.enum;
    this.#showDefaults();
  }

  /** Shows limit and default of /score's repeats, from its part of the document. */
  describeRepeats({ default: usual, maximum }) {
    Object.assign(find("#repeats"), { placeholder: usual, max: maximum });
  }

  /** Offers models; the choice stays, if it is among them. */
  offer(models) {
    const { choice } = this;
    this.models = models;
    const usual = models.find((model) => model.promoted);
    const others = models.filter((model) => !model.promoted);
    find("#model").replaceChildren(
      h("option", { value: "" }, usual?.name ?? "default"),
      ...others.map((model) => h("option", { value: model.name }, model.name)),
    );
    find("#model").value = this.choiceOf({ model: choice });
    this.#showDefaults();
  }

  /** Fills in the fields from a job, so that it can be generated again. */
  load(job) {
    find("#model").value = this.choiceOf(job);
    this.#showDefaults();
    if (!this.samplers) find("#sampler").append(h("option", { value: job.options.sampler }, job.options.sampler)); // the document may be on its way
    for (const name of ["steps", "guidance", "sampler"]) {
      const usual = job.options[name] === this.#usual()[name];
      find(`#${name}`).value = usual ? "" : job.options[name];
    }
    find("#seed").value = job.seed;
    find("#trajectory").value = job.trajectory ?? "";
    find("#attempts").value = job.options.attempts ?? "";
    const usual = { ...this.#usual(), columns: this.columns };
    const own = Object.entries({ ...job.options, columns: job.columns }).filter(
      ([name, value]) => name in KEPT && String(value) !== String(usual[name]),
    );
    this.#keep(Object.fromEntries(own), job.first);
  }

  /** The body of POST /generate for `asked`, the composer's fields, with the options `given`. */
  request(asked, given) {
    if (!this.#keepsFirst()) return { ...asked, ...given };
    const { seed, trajectory, columns, model: _, ...chosen } = given;
    const options = { ...this.#usual(), ...chosen };
    if (options.sampler !== "ddim") options.eta = 0;
    const { name, digest } = this.model;
    return { recipe: recipeOf({ ...asked, model: name, digest, seed, first: this.first, options, trajectory, columns }) };
  }

  #keep(kept, first) {
    Object.assign(this, { kept, first });
    this.#showKept();
  }

  /** The kept options; only ddim has eta. */
  #keptOptions() {
    const { eta, ...others } = this.kept;
    const sampler = find("#sampler").value || this.#usual().sampler;
    return eta !== undefined && sampler === "ddim" ? { ...others, eta } : others;
  }

  /** Whether the first position is kept; without the job's seed it has no meaning. */
  #keepsFirst() {
    return this.first > 0 && find("#seed").value !== "" && find("#seed").validity.valid && this.model !== undefined;
  }

  #showKept() {
    const words = Object.entries(this.#keptOptions()).map(([name, value]) => KEPT[name](value));
    if (this.#keepsFirst()) words.push(`the noise of its request's pictures from number ${this.first + 1} on`);
    find("#kept").hidden = !words.length;
    find("#kept-words").textContent = `Kept from the job: ${words.join(", ")}.`;
  }

  /** The values of the fields, {steps: 20, ...}, or null after showing which field is not valid. */
  read(mode) {
    const given = {};
    for (const name of NUMBERS) {
      const field = find(`#${name}`);
      if (elsewhere(name, mode)) continue;
      if (!field.reportValidity()) return null;
      if (field.value !== "") given[name] = Number(field.value);
    }
    return { ...given, ...this.#chosen(mode) };
  }

  /** The valid values of the fields; leaves out the others without a message. */
  peek(mode) {
    const fine = NUMBERS.filter((name) => !elsewhere(name, mode))
      .map((name) => [name, find(`#${name}`)])
      .filter(([, field]) => field.value !== "" && field.validity.valid);
    return { ...Object.fromEntries(fine.map(([name, field]) => [name, Number(field.value)])), ...this.#chosen(mode) };
  }

  #chosen(mode) {
    const chosen = CHOICES.map((name) => [name, find(`#${name}`).value]).filter(([, value]) => value);
    const until = mode === "draw" && find("#attempts").value !== "" ? { until: "exact" } : {};
    return { ...Object.fromEntries(chosen), ...until, ...(mode === "draw" ? this.#keptOptions() : {}) };
  }

  /** What counts for uploaded pictures: the model whose evaluator judges them. */
  judging() {
    return this.choice ? { model: this.choice } : {};
  }

  /** The chosen model's name; empty for the promoted one. */
  get choice() {
    return find("#model").value;
  }

  /** The choice for a job's model, or for the promoted one if that is gone. */
  choiceOf(job) {
    return this.models.some((one) => one.name === job.model && !one.promoted) ? job.model : "";
  }

  /** The chosen model, as GET /models has it. */
  get model() {
    const name = this.choice;
    return this.models.find((one) => (name ? one.name === name : one.promoted));
  }

  #usual() {
    return { ...this.defaults, ...this.model?.sampling };
  }

  #showDefaults() {
    const { steps = "", guidance = "", sampler } = this.#usual();
    find("#steps").placeholder = steps;
    find("#guidance").placeholder = guidance;
    const before = find("#sampler").value;
    find("#sampler").replaceChildren(
      h("option", { value: "" }, sampler ?? "default"),
      ...(this.samplers ?? []).filter((name) => name !== sampler).map((name) => h("option", { value: name }, name)),
    );
    find("#sampler").value = before === sampler ? "" : before;
    this.#showKept();
  }
}
