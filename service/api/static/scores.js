// The scores of a finished job: figures in a row, and a dot for each of several runs.

import { byLabel } from "./bylabel.js";
import { h, svg } from "./dom.js";
import { figure } from "./words.js";

const WIDTH = 320;
const HEIGHT = 44;
const EDGE = 6;

/** The figures of a job's result, and below those of a score `more`: what else there is to see of it. */
export function scoreboard(job, more) {
  const { result } = job;
  const exact = result.pictures.filter((picture) => picture.exact).length;
  if (job.kind === "generate") {
    const rows = figures([
      ["Exact", String(exact), `of ${result.pictures.length}`],
      ["Accuracy", figure(result.accuracy)],
      ["F1", figure(result.f1)],
    ]);
    const words = "Selected: each picture is the best of its attempts, so these figures are not the model's.";
    return result.selected ? h("div", {}, rows, h("p", { class: "note" }, words)) : rows;
  }
  const { accuracy, exact_match: exactMatch, f1, repeats } = result;
  return h(
    "div",
    {},
    figures([
      ["Accuracy", figure(accuracy.mean), `± ${figure(accuracy.std)}`],
      ...(job.options ? [["Best run", figure(accuracy.max), `seed ${repeats[result.best].seed}`]] : []),
      ["Exact match", figure(exactMatch.mean), `± ${figure(exactMatch.std)}`],
      ["F1", figure(f1.mean), `± ${figure(f1.std)}`],
    ]),
    accuracy.std > 0 ? spread(repeats, result.best) : null,
    byLabel(result),
    more,
    repeats.length > 1 ? h("p", { class: "note" }, "The pictures are from the best run.") : null,
  );
}

function figures(rows) {
  return h(
    "dl",
    { class: "figures" },
    rows.map(([name, value, beside]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value, beside ? h("small", {}, ` ${beside}`) : null)),
    ),
  );
}

/** A dot for each run on a line from the worst accuracy to the best. */
function spread(repeats, best) {
  const values = repeats.map((run) => run.accuracy);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const x = (value) => EDGE + ((value - low) / (high - low)) * (WIDTH - 2 * EDGE);
  const dots = values.map((value, index) =>
    svg("circle", { cx: x(value), cy: 14, r: 5, class: index === best ? "dot best" : "dot" }, svg("title", {}, `seed ${repeats[index].seed}: ${figure(value)}`)),
  );
  const words = `Accuracy of ${repeats.length} runs, from ${figure(low)} to ${figure(high)}`;
  return svg(
    "svg",
    { class: "spread", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words },
    svg("path", { d: `M${EDGE} 14H${WIDTH - EDGE}` }),
    dots,
    svg("text", { x: EDGE - 4, y: 38 }, figure(low)),
    svg("text", { x: WIDTH - EDGE + 4, y: 38, "text-anchor": "end" }, figure(high)),
  );
}
