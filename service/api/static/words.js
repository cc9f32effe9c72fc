// Figures, times and command lines as text.

import { address, apiKey } from "./api.js";

export const percent = (fraction) => `${Math.round(100 * fraction)} %`;
export const tenths = (fraction) => `${(100 * fraction).toFixed(1)} %`;
export const figure = (value) => value.toFixed(3);
export const counted = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

/** "14:03", or "28 Nov, 14:03" of another day, in the reader's language. */
export function when(iso) {
  const [then, now] = [new Date(iso), new Date()];
  const day = then.toDateString() === now.toDateString() ? {} : { day: "numeric", month: "short" };
  return then.toLocaleString([], { ...day, hour: "2-digit", minute: "2-digit" });
}

/** "14:03:20" */
export const clock = (iso) => new Date(iso).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/** "1.4 s", "2 min 5 s" */
export function lasting(seconds) {
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const named = (file) => `@"${file.replaceAll(/["\\]/g, "\\$&")}"`; // curl would split other names at , and ;
const authorization = () => (apiKey.get() ? ` \\\n  -H "authorization: Bearer $LABELGRID_API_KEY"` : "");

/** The command that draws the same. It reads the key from the shell's environment. */
export function generateCommand(body) {
  return (
    `curl -s ${address("generate")} -o grid.png${authorization()} \\\n` +
    `  -H 'content-type: application/json' -H 'accept: image/png' \\\n  -d ${quoted(JSON.stringify(body))}`
  );
}

/** The command that scores the same test file, and a zip of pictures if there is one. */
export function scoreCommand(fileName, zipName, fields) {
  const sent = [`file=${named(fileName)}`, ...(zipName ? [`pictures=${named(zipName)}`] : [])];
  const given = Object.entries(fields).map(([name, value]) => `${name}=${value}`);
  const parts = [...sent, ...given].map((part) => `-F ${quoted(part)}`);
  return `curl -s ${address("score")}${authorization()} \\\n  ${parts.join(" ")}`;
}

/** A recipe (docs/api.md): the fields of a request plus the position of its first picture. */
export const recipeOf = ({ model, digest, labels, layouts, seed, first, options, trajectory, columns }) => ({
  version: 1,
  model: { name: model, digest },
  labels,
  ...(layouts && { layouts }),
  seed,
  first,
  options,
  ...(trajectory && { trajectory }),
  ...(columns && { columns }),
});

/** A request for the pictures of a job, with every option of the job. */
export function requestOf(job) {
  if (job.first || job.options.kept) return { recipe: recipeOf(job) };
  const { eta, ...options } = job.options;
  const { labels, layouts, seed, model, trajectory, columns } = job;
  return {
    labels,
    ...(layouts && { layouts }),
    seed,
    model,
    ...options,
    ...(eta ? { eta } : {}),
    ...(trajectory && { trajectory }),
    columns,
  };
}
