// A test file that is chosen or dropped anywhere on the page: read, looked at, shown by name.

import { find } from "./dom.js";
import { counted } from "./words.js";

/** The file to score; `changed()` is called when there is another, `dropped()` when one was dropped. */
export class TestFile {
  constructor({ changed, dropped }) {
    this.file = null;
    this.lists = null;
    this.changed = changed;
    find("#file").addEventListener("change", () => this.take(find("#file").files[0]));
    let depth = 0; // dragenter and dragleave come for every element on the way
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
      dropped();
      this.take(event.dataTransfer.files[0]);
    });
  }

  async take(file) {
    if (!file) return;
    this.file = file;
    this.lists = null;
    let note;
    try {
      const content = JSON.parse(await file.text());
      if (Array.isArray(content) && content.every(Array.isArray)) {
        this.lists = content;
        note = `${counted(content.length, "label list")}. Choose another file to replace it.`;
      } else note = "This is JSON, but not a list of label lists such as [[\"red cube\"], [\"blue sphere\"]].";
    } catch {
      note = "This is not JSON. Wanted is a list of label lists such as [[\"red cube\"], [\"blue sphere\"]].";
    }
    find("#file-name").textContent = file.name;
    find("#file-note").textContent = note;
    find("#drop").dataset.state = this.lists ? "read" : "wrong";
    this.changed();
  }
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
