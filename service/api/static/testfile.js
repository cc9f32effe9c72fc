// Files that are dropped anywhere on the page or chosen: a test file and a zip of pictures to score, or a PNG with a
// recipe. Checks their content and shows their names.

import { Problem } from "./api.js";
import { find } from "./dom.js";
import { counted } from "./words.js";

const ZIP = [0x50, 0x4b]; // a zip's first bytes, "PK"
const PNG = [0x89, 0x50, 0x4e, 0x47];

/**
 * The files to score; calls `changed()` when they change, `taken()` when files were dropped, and `pictureDropped(png)`
 * for a PNG.
 */
export class TestFile {
  constructor({ changed, taken, pictureDropped }) {
    this.file = null;
    this.lists = null;
    this.pictures = null; // the zip
    this.changed = changed;
    find("#file").addEventListener("change", () => this.take(find("#file").files));
    find("#zip-remove").addEventListener("click", () => {
      this.#takePictures(null);
      find("#file").focus();
    });
    let depth = 0; // every element on the way gets dragenter and dragleave
    const over = (by) => {
      depth = by === null ? 0 : depth + by;
      find("#dropping").hidden = depth <= 0;
    };
    addEventListener("dragenter", (event) => hasFiles(event) && over(1));
    addEventListener("dragleave", (event) => hasFiles(event) && over(-1));
    addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      over(null);
      this.#drop([...event.dataTransfer.files], taken, pictureDropped);
    });
  }

  async #drop(files, taken, pictureDropped) {
    if (await begins(files[0], PNG)) return pictureDropped(files[0]);
    taken();
    await this.take(files);
  }

  /** Takes a test file, a zip, or both; keeps the other. */
  async take(files) {
    for (const file of [...files]) {
      if (await begins(file, ZIP)) this.#takePictures(file);
      else await this.#takeLists(file);
    }
    find("#file").value = ""; // so that the same file, edited, can be chosen again
  }

  /** Throws a Problem if a file cannot be sent: browsers refuse one that was edited after it was chosen. */
  async check() {
    for (const file of [this.file, this.pictures].filter(Boolean)) {
      try {
        await file.slice(0, 1).arrayBuffer();
      } catch {
        throw new Problem(`${file.name} has changed since it was chosen. Choose it again.`, { status: null });
      }
    }
  }

  #takePictures(file) {
    this.pictures = file;
    find("#zip").hidden = !file;
    find("#zip-note").textContent = file ? `The pictures in ${file.name} are scored; none are generated. The model's evaluator judges them.` : "";
    if (!this.file) find("#file-note").textContent = "Now add the test file with the labels of these pictures.";
    this.changed();
  }

  async #takeLists(file) {
    this.file = file;
    this.lists = null;
    let note;
    try {
      const content = JSON.parse(await file.text());
      if (Array.isArray(content) && content.every(Array.isArray)) {
        this.lists = content;
        note = `${counted(content.length, "label list")}. Choose another file to replace it.`;
      } else note = "This is JSON, but not a list of label lists such as [[\"red cube\"], [\"blue sphere\"]].";
    } catch (error) {
      const isRead = error instanceof SyntaxError;
      note = isRead ? "This is not JSON. It should be a list of label lists such as [[\"red cube\"], [\"blue sphere\"]]." : "This is a folder, or it cannot be read. Pictures to score come as a zip.";
    }
    find("#file-name").textContent = file.name;
    find("#file-note").textContent = note;
    find("#drop").dataset.state = this.lists ? "read" : "wrong";
    this.changed();
  }
}

async function begins(file, bytes) {
  const content = await file.slice(0, bytes.length).arrayBuffer().catch(() => null); // a folder has none
  const begin = content ? new Uint8Array(content) : [];
  return bytes.every((byte, i) => begin[i] === byte);
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
