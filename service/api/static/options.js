// The fields of seed, steps, guidance, stages of a strip, repeats, sampler and model. Limits and defaults come from the
// API's own description and from the model; an empty field is not sent, and so is the model's default. What a job has that
// no field shows is kept when it is edited as a new one, and told in words.

import { find, h } from "./dom.js";
import { counted, recipeOf } from "./words.js";

const NUMBERS = ["seed", "steps", "guidance", "trajectory", "repeats"];
const ONLY = { trajectory: "draw", repeats: "score" }; // the fields that one mode alone has
const CHOICES = ["sampler", "model"];
const KEPT = {
  spacing: (name) => `spacing ${name}`,
  guidance_interval: ([low, high]) => `guidance from ${low} to ${high} of T`,
  eta: (eta) => `eta ${eta}`,
  clip_x0: (on) => (on ? "x0 clipped" : "x0 not clipped"),
  columns: (n) => `${counted(n, "column")} in the grid`,
};

const elsewhere = (name, mode) => name in ONLY && ONLY[name] !== mode;

/** The options' fields; `changed()` is called after each change, `modelChanged(name)` after another model. */
export class Options {
  constructor(changed, modelChanged) {
    this.models = [];
    this.defaults = {};
    this.kept = {}; // a job's options that no field shows
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
      modelChanged(find("#model").value || null);
    });
  }

  /** Takes limits, defaults and samplers from an OpenAPI document. */
  describe({ components: { schemas } }) {
    const own = schemas.SamplingOptions.properties;
    for (const name of ["sampler", "steps", "guidance"]) this.defaults[name] = own[name].default;
    for (const name of ["steps", "guidance"]) find(`#${name}`).max = own[name].maximum;
    const asked = schemas.GenerateRequest.properties;
    this.columns = asked.columns.default;
    find("#seed").max = asked.seed.anyOf[0].maximum;
    const { minimum, maximum } = asked.trajectory.anyOf[0];
    Object.assign(find("#trajectory"), { min: minimum, max: maximum });
    this.samplers = own.sampler.enum;
    this.#showDefaults();
  }

  /** Limits and default of the repeats of /score, from its part of the same document. */
  describeRepeats({ default: usual, maximum }) {
    Object.assign(find("#repeats"), { placeholder: usual, max: maximum });
  }

  offer(models) {
    this.models = models;
    const usual = models.find((model) => model.promoted);
    const others = models.filter((model) => !model.promoted);
    find("#model").replaceChildren(
      h("option", { value: "" }, usual?.name ?? "default"),
      ...others.map((model) => h("option", { value: model.name }, model.name)),
    );
    this.#showDefaults();
  }

  /** Fills the fields in from a job, so that it can be made again. */
  load(job) {
    find("#model").value = this.models.some((one) => one.name === job.model && !one.promoted) ? job.model : "";
    this.#showDefaults();
    for (const name of ["steps", "guidance", "sampler"]) {
      const usual = job.options[name] === this.#usual()[name];
      find(`#${name}`).value = usual ? "" : job.options[name];
    }
    find("#seed").value = job.seed;
    find("#trajectory").value = job.trajectory ?? "";
    const usual = { ...this.#usual(), columns: this.columns };
    const own = Object.entries({ ...job.options, columns: job.columns }).filter(
      ([name, value]) => name in KEPT && String(value) !== String(usual[name]),
    );
    this.#keep(Object.fromEntries(own), job.first);
  }

  /** What POST /generate is sent for `asked`, as the composer has it, with the options `given`. */
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

  /** The options that are kept; eta is ddim's alone. */
  #keptOptions() {
    const { eta, ...others } = this.kept;
    const sampler = find("#sampler").value || this.#usual().sampler;
    return eta !== undefined && sampler === "ddim" ? { ...others, eta } : others;
  }

  /** Whether a position is kept; without the job's seed it says nothing. */
  #keepsFirst() {
    return this.first > 0 && find("#seed").value !== "" && find("#seed").validity.valid && this.model !== undefined;
  }

  #showKept() {
    const words = Object.entries(this.#keptOptions()).map(([name, value]) => KEPT[name](value));
    if (this.#keepsFirst()) words.push(`noise of its request's pictures from ${this.first + 1} on`);
    find("#kept").hidden = !words.length;
    find("#kept-words").textContent = `Kept from the job: ${words.join(", ")}.`;
  }

  /** What was filled in, {steps: 20, ...}, or null after showing what is wrong with a field. */
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

  /** The same without complaint: what cannot be used is left out. */
  peek(mode) {
    const fine = NUMBERS.filter((name) => !elsewhere(name, mode))
      .map((name) => [name, find(`#${name}`)])
      .filter(([, field]) => field.value !== "" && field.validity.valid);
    return { ...Object.fromEntries(fine.map(([name, field]) => [name, Number(field.value)])), ...this.#chosen(mode) };
  }

  #chosen(mode) {
    const chosen = CHOICES.map((name) => [name, find(`#${name}`).value]).filter(([, value]) => value);
    return { ...Object.fromEntries(chosen), ...(mode === "draw" ? this.#keptOptions() : {}) };
  }

  /** The chosen model, as GET /models has it. */
  get model() {
    const name = find("#model").value;
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
