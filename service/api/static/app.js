// Wires the page together: the composer, options and files become a job, which is shown and listed.

import { Problem, apiKey, createJob, readDescription, readLabels, readModels, readReady, storage } from "./api.js";
import { Composer } from "./composer.js";
import { announce, copy, find } from "./dom.js";
import { Editor } from "./editor.js";
import { History } from "./history.js";
import { JobView } from "./job.js";
import { Options } from "./options.js";
import { Support, ratioOf, stretchOf } from "./support.js";
import { TestFile } from "./testfile.js";
import { counted, generateCommand, scoreCommand } from "./words.js";

const LOOK_AGAIN_MS = 20_000;

let mode = "draw";
let sending = false;
let unread = false; // whether models, labels, jobs or limits could not be read for a reason that may pass

const composer = new Composer(() => {
  find("#objects-block #refusal")?.replaceChildren(); // it was about the labels before
  update();
});
const options = new Options(update, (choice) => attempt(() => loadLabels(choice)));
const testFile = new TestFile({ changed: update, taken: () => setMode("score"), pictureDropped: makeAgain });
const modelOf = (job) => options.models.find((model) => model.digest === job.digest);
const history = new History({ attempt, deleted: leave, stretchOf: (job) => stretchOf(modelOf(job)) });
const editor = new Editor({ failed: refuse, ended: () => attempt(() => history.refresh()) });
const view = new JobView({
  edit: (job, card) => attempt(() => edit(job, card)),
  ratioOf: (job) => ratioOf(modelOf(job)),
  laid: showCanvas,
  reuse,
  failed: refuse,
  ended: () => {
    attempt(() => history.refresh());
    look();
  },
});

/** Runs an action that calls the service, and shows what went wrong. */
async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    refuse(error);
  }
}

function refuse(problem) {
  const inPicture = problem.entry !== null && mode === "draw";
  const words = inPicture ? `Picture ${composer.chooseAsked(problem.entry) + 1}:` : "$&";
  find(inPicture ? "#objects-block" : ".go").append(find("#refusal")); // beside the labels that it is about
  find("#refusal").textContent = problem.message.replace(/^Picture \d+:/, words);
  find("#refusal").scrollIntoView({ block: "nearest" }); // a phone may show the pictures only
  if (problem.status === 401) askForKey(problem.message);
  if (problem.status === 0) showReady("away", "No connection");
}

// Composing and sending

/** Shows what the button would do. */
function update() {
  const count = composer.asked().labels.length;
  const button = find("#go");
  if (mode === "draw") {
    button.textContent = count ? `Draw ${counted(count, "picture")}` : "Draw";
    button.disabled = sending || !count;
    find("#command").textContent = generateCommand(options.request(composer.asked(), options.peek(mode)));
  } else {
    button.textContent = testFile.pictures ? "Score these pictures" : "Score";
    button.disabled = sending || !testFile.lists;
    const given = testFile.pictures ? options.judging() : options.peek(mode);
    find("#command").textContent = scoreCommand(testFile.file?.name ?? "test.json", testFile.pictures?.name, given);
  }
  find("#options-block").classList.toggle("judging", picturesAreSent());
}

const picturesAreSent = () => mode === "score" && testFile.pictures !== null;

async function go() {
  if (find("#go").disabled) return;
  if (mode === "draw" && showsProblem()) return;
  const given = picturesAreSent() ? options.judging() : options.read(mode);
  if (!given) return;
  await send(() => (mode === "draw" ? createJob("generate", options.request(composer.asked(), given)) : score(given)));
}

/** Shows the first picture that the model cannot draw, and returns whether there is one. */
function showsProblem() {
  const problem = composer.problem();
  if (!problem) return false;
  composer.choose(problem.index);
  find("#strip [aria-current]").focus();
  announceProblem(problem);
  return true;
}

const announceProblem = ({ index, words }) => announce(`Picture ${index + 1}: ${words}`);

/** Generates the pictures of a PNG again, from the recipe in it. */
async function makeAgain(png) {
  if (sending) return;
  setMode("draw");
  const form = new FormData();
  form.append("file", png);
  await send(() => createJob("generate/png", form).catch((problem) => {
    throw Object.assign(problem, { entry: null }); // it is one of the PNG's pictures, none of those composed
  }));
}

/** Creates a job and opens it. */
async function send(create) {
  find("#refusal").textContent = "";
  const focused = document.activeElement;
  sending = true;
  update();
  const job = await attempt(create);
  sending = false;
  update();
  if (document.activeElement === document.body) focused.focus({ preventScroll: true }); // a disabled button loses it
  if (!job) return;
  show(job);
  announce(`${counted(job.progress.total, "picture")} requested.`);
  attempt(() => history.refresh());
}

async function score(given) {
  await testFile.check();
  const form = new FormData();
  form.append("file", testFile.file);
  if (testFile.pictures) form.append("pictures", testFile.pictures);
  for (const [name, value] of Object.entries(given)) form.append(name, value);
  return createJob("score", form);
}

/** Opens a new job at an address of its own. */
function show(job) {
  window.history.pushState(null, "", `#${job.id}`);
  history.mark(job.id);
  view.open(job);
}

/** Scrolls to the pictures, from the gallery below them or, on a phone, from the composer above them. */
function showCanvas() {
  const { top } = find("#canvas").getBoundingClientRect();
  if (top < 0 || top > window.innerHeight / 2) find("#canvas").scrollIntoView();
}

/** Leaves the address of a job that was deleted, if the page shows it. */
function leave(id) {
  if (view.id !== id) return;
  window.history.replaceState(null, "", location.pathname + location.search);
  openAddress();
}

async function reuse(job) {
  const answer = await attempt(() => readLabels(options.choiceOf(job)));
  if (!answer) return;
  setMode("draw");
  options.load(job);
  offer(answer.labels);
  composer.load(job.labels, job.layouts);
  update();
  find(".composer").scrollIntoView({ block: "nearest" });
  find("#strip [aria-current]").focus();
}

/** Opens a picture to edit it. */
async function edit(job, card) {
  const model = modelOf(job);
  const { labels } = await readLabels(model?.name ?? job.model);
  editor.open(card, { labels, support: new Support(model), ratio: card.ratio });
}

function setMode(next) {
  mode = next;
  for (const name of ["draw", "score"]) {
    const tab = find(`#${name}-tab`);
    tab.setAttribute("aria-selected", name === mode);
    tab.tabIndex = name === mode ? 0 : -1;
    find(`#${name}-panel`).hidden = name !== mode;
  }
  find("#repeats-field").hidden = mode !== "score";
  for (const name of ["trajectory", "attempts"]) find(`#${name}-field`).hidden = mode !== "draw";
  find("#kept-block").hidden = mode !== "draw"; // only jobs in draw mode can be edited as new
  find("#refusal").textContent = "";
  update();
}

// Labels, models and readiness

/** Offers the labels of the chosen model. */
function offer(labels) {
  const { model } = options;
  composer.offer(labels, { support: new Support(model), placeable: model?.positions ?? false, ratio: ratioOf(model) ?? 1 });
}

async function loadLabels(choice) {
  const { labels } = await readLabels(choice);
  if (choice !== options.choice) return; // another model was chosen meanwhile
  offer(labels);
  const problem = composer.problem();
  if (problem) announceProblem(problem);
  if (!view.id) openAddress();
}

async function load() {
  try {
    options.offer((await readModels()).models);
    view.reshape();
    await loadLabels(options.choice);
    find("#refusal").textContent = "";
    await Promise.all([history.refresh(), describe()]);
    unread = false;
    update();
  } catch (error) {
    unread = error instanceof Problem && error.mayPass;
    throw error;
  }
}

/** Shows the limits of the fields. The document is by far the largest of the answers, so nothing else waits for it. */
async function describe() {
  const description = await readDescription();
  options.describe(description);
  options.describeRepeats(description.components.schemas.ScoreForm.properties.repeats);
}

async function look() {
  try {
    const { workers, devices } = await readReady();
    if (find("#ready").dataset.state === "away" || view.lost || unread) catchUp();
    showReady("ready", workers > 1 ? `Ready, ${workers} workers: ${devicesOf(devices)}` : "Ready");
    find("#ready").title = devices.map(({ name, models }) => `${name}: ${models.join(", ")}`).join("\n");
    if (history.isStale) await history.refresh();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    showReady("away", error.status === 0 ? "No connection" : error.message);
  }
}

/** Names the devices, each with its number of workers if there are several. */
function devicesOf(devices) {
  const counts = new Map();
  for (const { name } of devices) counts.set(name, (counts.get(name) ?? 0) + 1);
  return [...counts].map(([name, count]) => (count > 1 ? `${count} on ${name}` : name)).join(", ");
}

/** Reads what could not be read while the service was away. */
function catchUp() {
  if (unread) attempt(load);
  else if (view.lost) openAddress();
}

function showReady(state, words) {
  const ready = find("#ready");
  ready.dataset.state = state;
  if (ready.textContent !== words) ready.textContent = words; // screen readers say what is new only
}

// The key, the theme, the address

/** Opens the dialog for the key; `reason` says why it is needed. */
function askForKey(reason = "") {
  const dialog = find("#key-dialog");
  if (!dialog.open) {
    find("#key").value = apiKey.get();
    dialog.returnValue = "cancel"; // the value after Escape and Cancel
    dialog.showModal();
  }
  find("#key-refusal").textContent = reason;
}

function keyGiven() {
  if (find("#key-dialog").returnValue !== "save") return;
  apiKey.set(find("#key").value.trim());
  showKey();
  update();
  attempt(load);
  look();
}

function showKey() {
  find("#key-button").textContent = apiKey.get() ? "Key set" : "Key";
}

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  storage.setItem("labelgrid.theme", theme);
  find("#theme-button").setAttribute("aria-pressed", isDark());
}

function openAddress() {
  const id = location.hash.slice(1);
  history.mark(id);
  if (/^[0-9a-f]{32}$/.test(id)) view.open(id);
  else {
    view.invite(composer.atRandom(), (pictures) => {
      composer.load(pictures);
      go();
    });
  }
}

for (const name of ["draw", "score"]) {
  find(`#${name}-tab`).onclick = () => setMode(name);
  find(`#${name}-tab`).onkeydown = (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    setMode(mode === "draw" ? "score" : "draw");
    find(`#${mode}-tab`).focus();
  };
}
find(".skip").onclick = (event) => {
  event.preventDefault(); // the address is that of the job shown
  find("#canvas").focus();
};
find("#go").onclick = go;
find("#again").onclick = () => find("#again-file").click();
find("#again-file").onchange = async ({ target }) => {
  await makeAgain(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
find("#copy-command").onclick = (event) => copy(find("#command").textContent, event.target);
find("#key-button").onclick = () => askForKey();
find("#key-cancel").onclick = () => find("#key-dialog").close(); // no submit button, or Enter in the field would press it
find("#key-dialog").addEventListener("close", keyGiven);
find("#theme-button").onclick = () => setTheme(isDark() ? "light" : "dark");
addEventListener("hashchange", openAddress);
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    go();
  }
});
setInterval(() => document.visibilityState === "visible" && look(), LOOK_AGAIN_MS);
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && look());

find("#theme-button").setAttribute("aria-pressed", isDark());
showKey();
setMode("draw");
openAddress();
look();
attempt(load);
