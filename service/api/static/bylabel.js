// A score by label and by number of objects: tables, and a heat map of what was there instead of a missing label.

import { h, svg } from "./dom.js";
import { figure } from "./words.js";

const CELL = 26;

/** What went wrong, closed until somebody wants to know. Older jobs have no such counts. */
export function byLabel({ by_label: labels = [], by_objects: objects = [] }) {
  if (!labels.length) return null;
  const recall = (one) => (one.asked ? one.found / one.asked : Infinity);
  const faulty = labels
    .filter((one) => one.found < one.asked || one.extra > 0)
    .sort((a, b) => recall(a) - recall(b) || b.extra - a.extra);
  return h(
    "details",
    { class: "more" },
    h("summary", {}, "By label"),
    faulty.length ? labelTable(faulty) : h("p", { class: "note" }, "Each label was found wherever it was asked for, and nowhere else."),
    heatMap(faulty.filter((one) => Object.keys(one.instead).length)),
    table(
      ["Objects", "Pictures", "Exact", "Share"],
      objects.map((one) => [String(one.objects), one.pictures, one.exact, figure(one.exact / one.pictures)]),
    ),
  );
}

function labelTable(labels) {
  return table(
    ["Label", "Asked", "Found", "Missing", "Extra", "Recall"],
    labels.map((one) => [one.label, one.asked, one.found, one.asked - one.found, one.extra, one.asked ? figure(one.found / one.asked) : ""]),
  );
}

function table(head, rows) {
  return h(
    "div",
    { class: "scrolled" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map(([first, ...rest]) => h("tr", {}, h("th", { scope: "row" }, first), rest.map((cell) => h("td", {}, String(cell)))))),
    ),
  );
}

/** A row for each missing label, a column for each label that its pictures have without being asked. */
function heatMap(labels) {
  if (!labels.length) return null;
  const others = [...new Set(labels.flatMap((one) => Object.keys(one.instead)))].sort();
  const most = Math.max(...labels.flatMap((one) => Object.values(one.instead)));
  const letters = (names) => 8 * Math.max(...names.map((name) => [...name].length)); // pixels, about
  const [left, top] = [letters(labels.map((one) => one.label)) + 8, letters(others) + 8];
  const [width, height] = [left + CELL * others.length, top + CELL * labels.length];
  const heads = others.map((other, i) =>
    svg("text", { transform: `translate(${left + CELL * (i + 0.62)} ${top - 6}) rotate(-90)` }, other),
  );
  const rows = labels.map((one, row) => [
    svg("text", { x: left - 8, y: top + CELL * (row + 0.65), "text-anchor": "end" }, one.label),
    ...others.map((other, column) => {
      const count = one.instead[other] ?? 0;
      const [x, y] = [left + CELL * column, top + CELL * row];
      return svg(
        "g",
        {},
        svg("rect", { x, y, width: CELL - 1, height: CELL - 1, rx: 4, "fill-opacity": 0.06 + (0.8 * count) / most }),
        count ? svg("text", { x: x + CELL / 2, y: y + CELL * 0.65, "text-anchor": "middle" }, String(count)) : null,
        count ? svg("title", {}, `${one.label} missing, ${other} instead: ${count}`) : null,
      );
    }),
  ]);
  return h(
    "figure",
    { class: "scrolled" },
    h("figcaption", { class: "note" }, "Pictures that lack the label of a row and show that of a column instead:"),
    svg("svg", { class: "heat", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "What appears instead" }, heads, rows.flat()),
  );
}
