"use strict";
// Texts of cases are anyone's: everything goes onto the page as text or attribute, nothing as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const MISSING = "--";
const PAGE = 20; // cases side by side
const DASHES = ["", "7 4", "2 4", "9 3 2 3"];
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

const unique = (values) => [...new Set(values)];

/** A number as it is printed: three decimals for scores, short for costs. */
function shown(value) {
  if (value === null || value === undefined) return MISSING;
  if (Math.abs(value) >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 3);
}

function withInterval([value, low, high]) {
  return low === null ? shown(value) : `${shown(value)} (${shown(low)}–${shown(high)})`;
}

/** Fill a <select> and keep what was chosen, where it is still there. */
function offer(select, options, preferred) {
  const before = select.value || preferred;
  select.replaceChildren(...options.map((option) => (option instanceof Node ? option : new Option(option, option))));
  const values = [...select.options].map((option) => option.value);
  select.value = values.includes(before) ? before : (values[0] ?? "");
}

// --- What curves and cases are about ---------------------------------------------------------------------

const methods = unique(data.runs.map((run) => run.method)).sort();
const protocols = (run) => unique([...Object.keys(run.curves), ...Object.keys(run.cases)]);

function runsOfSetting() {
  return data.runs.filter(
    (run) => run.model === at("model").value && run.dataset === at("dataset").value && protocols(run).includes(at("protocol").value),
  );
}

function offerSettings() {
  const stored = data.runs.filter((run) => protocols(run).length);
  offer(at("model"), unique(stored.map((run) => run.model)));
  const ofModel = stored.filter((run) => run.model === at("model").value);
  offer(at("dataset"), unique(ofModel.map((run) => run.dataset)));
  const ofDataset = ofModel.filter((run) => run.dataset === at("dataset").value);
  offer(at("protocol"), unique(ofDataset.flatMap(protocols)));
}

const nameOf = (run) => (run.variant ? `${run.method} (${run.variant})` : run.method);

// --- Curves ----------------------------------------------------------------------------------------------

const withoutVariant = new Set(data.runs.filter((run) => !run.variant).map((run) => run.method));
// Names of curves that are switched off; at first the variants of methods that are there as they are.
const hidden = new Set(data.runs.filter((run) => run.variant && withoutVariant.has(run.method)).map(nameOf));
let curves = []; // what is drawn: {name, colour, dash, points: [{n, value, x, y}]}
let cursor = null; // [curve, point] under the pointer or the keyboard

/** Every run of the setting with its look: a colour by method, a dash by its place among the method's variants. */
function looks() {
  const seen = {};
  return runsOfSetting().map((run) => {
    const method = methods.indexOf(run.method);
    const place = (seen[run.method] = (seen[run.method] ?? -1) + 1);
    return { run, name: nameOf(run), colour: `c${(method + Math.floor(place / DASHES.length)) % 8}`, dash: DASHES[(place + Math.floor(method / 8)) % DASHES.length] };
  });
}

function offerScores() {
  const protocol = at("protocol").value;
  const there = new Set(runsOfSetting().flatMap((run) => Object.keys(run.curves[protocol]?.scores ?? {})));
  const groups = unique(data.scores.filter((score) => there.has(score.name)).map((score) => score.group));
  offer(
    at("score"),
    groups.map((group) =>
      element("optgroup", { label: group },
        ...data.scores.filter((score) => score.group === group && there.has(score.name)).map((score) => new Option(score.label, score.name))),
    ),
    "op",
  );
}

function offerMethods() {
  const boxes = looks().map(({ name, colour, dash }) => {
    const box = element("input", { type: "checkbox" });
    box.checked = !hidden.has(name);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(name);
      else hidden.add(name);
      drawChart();
    });
    const swatch = drawn("svg", { viewBox: "0 0 36 14", class: colour, "aria-hidden": "true" });
    swatch.append(drawn("line", { x1: 0, x2: 36, y1: 7, y2: 7, stroke: "currentColor", "stroke-width": 3, "stroke-dasharray": dash }));
    return element("label", {}, box, swatch, name);
  });
  at("methods").replaceChildren(at("methods").querySelector("legend"), ...boxes);
}

/** Round values between two ends, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) values.push(i * step || 0); // never -0
  return values;
}

function logTicks(low, high) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of [1, 2, 5]) all.push(factor * 10 ** power);
  }
  const inside = all.filter((n) => n >= low && n <= high);
  return inside.length > 1 ? inside : unique([low, ...inside, high]);
}

function readCurves() {
  const score = at("score").value;
  curves = looks().flatMap(({ run, name, colour, dash }) => {
    const stored = run.curves[at("protocol").value];
    const values = stored?.scores[score];
    if (!values || hidden.has(name)) return [];
    const points = stored.n.map((n, i) => ({ n, items: stored.items[i], value: values[i] })).filter((point) => point.value[0] !== null);
    return points.length ? [{ name, colour, dash, points }] : [];
  });
}

function drawChart() {
  readCurves();
  cursor = null;
  const chart = at("chart");
  const scoreLabel = data.scores.find((score) => score.name === at("score").value)?.label ?? "score";
  const setting = `${at("model").value}, ${at("dataset").value}, protocol ${at("protocol").value}`;
  at("caption").textContent = `${scoreLabel}: ${setting}`;
  chart.setAttribute("aria-label", `${scoreLabel} against the number of edits, ${curves.length} curves`);
  fillValues(at("caption").textContent);
  if (!curves.length) {
    chart.replaceChildren(element("p", { class: "hint" }, "No curve is chosen."));
    return;
  }
  const all = curves.flatMap((curve) => curve.points);
  const width = Math.max(280, chart.clientWidth);
  const height = Math.max(260, Math.min(420, width * 0.55));
  const edge = { left: 62, right: 30, top: 12, bottom: 46 };
  const highest = Math.max(...all.flatMap((point) => point.value.filter((value) => value !== null)));
  const top = highest <= 1 ? 1 : highest * 1.05;
  const isLog = at("axis").value === "log";
  const [first, last] = [Math.min(...all.map((point) => point.n)), Math.max(...all.map((point) => point.n))];
  const start = isLog ? first : 0;
  const along = isLog && last > first ? (n) => Math.log(n / first) / Math.log(last / first) : (n) => (last > start ? (n - start) / (last - start) : 0.5);
  const x = (n) => edge.left + along(n) * (width - edge.left - edge.right);
  const y = (value) => height - edge.bottom - (Math.max(0, value) / top) * (height - edge.top - edge.bottom);

  const middle = (height + edge.top - edge.bottom) / 2;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  for (const value of ticks(0, top, 5)) {
    svg.append(drawn("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" }, compact(value)));
  }
  for (const n of isLog ? logTicks(first, last) : ticks(start, last, Math.max(3, Math.floor(width / 120)))) {
    svg.append(drawn("line", { class: "grid", x1: x(n), x2: x(n), y1: height - edge.bottom, y2: height - edge.bottom + 5 }));
    svg.append(drawn("text", { x: x(n), y: height - edge.bottom + 19, "text-anchor": "middle" }, n.toLocaleString("en")));
  }
  svg.append(drawn("text", { class: "axis-title", x: (edge.left + width - edge.right) / 2, y: height - 6, "text-anchor": "middle" }, "edits"));
  svg.append(drawn("text", { class: "axis-title", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, scoreLabel));
  for (const curve of curves) {
    for (const point of curve.points) Object.assign(point, { x: x(point.n), y: y(point.value[0]) });
    const band = curve.points.filter((point) => point.value[1] !== null);
    const outline = [...band.map((p) => [p.x, y(p.value[2])]), ...band.reverse().map((p) => [p.x, y(p.value[1])])];
    const group = drawn("g", { class: curve.colour, "data-curve": curve.name });
    if (outline.length > 2) group.append(drawn("polygon", { class: "band", fill: "currentColor", points: outline.join(" ") }));
    group.append(drawn("polyline", { class: "curve", stroke: "currentColor", "stroke-dasharray": curve.dash, points: curve.points.map((p) => `${p.x},${p.y}`).join(" ") }));
    for (const point of curve.points) group.append(drawn("circle", { cx: point.x, cy: point.y, r: 3.5, fill: "currentColor" }));
    svg.append(group);
  }
  svg.append(drawn("circle", { class: "cursor", r: 7, visibility: "hidden" }));
  const tip = element("div", { class: "tip" });
  tip.hidden = true;
  chart.replaceChildren(svg, tip);
}

const compact = (value) => (Math.abs(value) >= 1e4 ? value.toLocaleString("en", { notation: "compact" }) : String(+value.toFixed(6)));

/** Show the values at the cursor, in the chart and to a screen reader. */
function point(place) {
  cursor = place;
  const [ring, tip] = [at("chart").querySelector(".cursor"), at("chart").querySelector(".tip")];
  if (!ring) return;
  ring.setAttribute("visibility", place ? "visible" : "hidden");
  tip.hidden = !place;
  if (!place) return;
  const curve = curves[place[0]];
  const { x, y, n, value, items } = curve.points[place[1]];
  ring.setAttribute("cx", x);
  ring.setAttribute("cy", y);
  tip.textContent = `${curve.name}, N = ${n.toLocaleString("en")}: ${withInterval(value)}, ${items} cases`;
  at("reading").textContent = tip.textContent;
  const width = at("chart").clientWidth;
  tip.style.left = `${Math.max(0, Math.min(x + 12, width - tip.offsetWidth))}px`;
  tip.style.top = `${y > 90 ? y - tip.offsetHeight - 12 : y + 14}px`;
}

function nearest(event) {
  const box = at("chart").getBoundingClientRect();
  let best = null;
  let least = 40 ** 2; // pixels
  curves.forEach((curve, i) => curve.points.forEach(({ x, y }, j) => {
    const distance = (x - event.clientX + box.left) ** 2 + (y - event.clientY + box.top) ** 2;
    if (distance < least) [best, least] = [[i, j], distance];
  }));
  return best;
}

function step(event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key === "Escape") point(null);
  if (!(event.key in moves) || !curves.length) return;
  event.preventDefault();
  const [down, right] = moves[event.key];
  const [i, j] = cursor ?? [0, -right];
  const curve = (i + down + curves.length) % curves.length;
  point([curve, Math.max(0, Math.min(j + right, curves[curve].points.length - 1))]);
}

function fillValues(caption) {
  const edits = unique(curves.flatMap((curve) => curve.points.map((point) => point.n))).sort((a, b) => a - b);
  const head = element("tr", {}, element("th", { scope: "col" }, "edits"), ...curves.map((curve) => element("th", { scope: "col" }, curve.name)));
  const rows = edits.map((n) =>
    element("tr", {}, element("th", { scope: "row" }, n.toLocaleString("en")),
      ...curves.map((curve) => {
        const point = curve.points.find((candidate) => candidate.n === n);
        return element("td", {}, point ? withInterval(point.value) : MISSING);
      })),
  );
  const table = element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...rows));
  at("values").querySelector(".wide").replaceChildren(table);
}

// --- Cases -----------------------------------------------------------------------------------------------

let page = 0;

function casesOfSetting() {
  const protocol = at("protocol").value;
  return runsOfSetting()
    .flatMap((run) => (run.cases[protocol]?.rows ?? []).map((row) => ({ run, row, n: run.cases[protocol].n })))
    .sort((a, b) => a.row.position - b.row.position);
}

function offerCaseFilters() {
  const all = casesOfSetting();
  const any = () => new Option("all", "");
  const families = unique(all.flatMap(({ row }) => row.families.map(([family]) => family)));
  offer(at("case-method"), [any(), ...unique(all.map(({ run }) => nameOf(run))).map((name) => new Option(name, name))]);
  offer(at("case-family"), [any(), ...families.map((name) => new Option(name, name))]);
}

/** The families of a case's probes that the filters leave. */
function filtered(row) {
  const [family, outcome, router] = ["case-family", "case-outcome", "case-router"].map((id) => at(id).value);
  return row.families.filter(([name, score, , , probes]) => {
    if (family && name !== family) return false;
    if (outcome && (score === null || (score === 1) !== (outcome === "right"))) return false;
    return !router || probes.some(([, , , matched]) => matched === (router === "matched"));
  });
}

function matches({ row, families }, words) {
  const text = [row.id, row.prompt, row.target, ...families.flatMap(([, , , , probes]) => probes.map(([prediction]) => prediction))];
  return !words || text.join("\n").toLowerCase().includes(words);
}

function showCases() {
  const words = at("case-search").value.trim().toLowerCase();
  const method = at("case-method").value;
  const all = casesOfSetting();
  const hits = all
    .filter(({ run }) => !method || nameOf(run) === method)
    .map((stored) => ({ ...stored, families: filtered(stored.row) }))
    .filter((kept) => kept.families.length && matches(kept, words));
  const pages = Math.max(1, Math.ceil(hits.length / PAGE));
  page = Math.max(0, Math.min(page, pages - 1));
  at("case-count").textContent = `${hits.length} of the ${all.length} cases on this page (${storedCases()} are stored).`;
  at("case-list").replaceChildren(...hits.slice(page * PAGE, (page + 1) * PAGE).map(caseCard));
  at("page-number").textContent = `page ${page + 1} of ${pages}`;
  at("previous").disabled = page === 0;
  at("next").disabled = page === pages - 1;
}

const storedCases = () => runsOfSetting().reduce((sum, run) => sum + (run.cases[at("protocol").value]?.total ?? 0), 0).toLocaleString("en");

function caseCard({ run, row, n, families }) {
  const about = `${nameOf(run)}; edit ${row.position + 1} of ${n.toLocaleString("en")}, case ${row.id}; ${row.edit}`;
  const head = ["probe", "prediction", "score", "before", "router"].map((name) => element("th", { scope: "col" }, name));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...families.flatMap(probeRows)));
  return element("article", { class: "case" }, element("h3", {}, `${row.prompt} → ${row.target}`), element("p", { class: "about" }, about), element("div", { class: "wide" }, table));
}

/** One row per probe; the score is the family's, over all its probes. */
function probeRows([family, score, before, text, probes]) {
  const metrics = Object.entries(text).map(([name, value]) => `${name} ${shown(value)}`).join(", ");
  const look = score === null ? "" : score === 1 ? "right" : "wrong";
  return probes.map(([prediction, ...route], i) => {
    const scored = i === 0 ? (metrics || shown(score)) : "";
    return element("tr", {},
      element("td", {}, i === 0 ? family : ""), element("td", {}, prediction), element("td", { class: look }, scored),
      element("td", {}, i === 0 ? shown(before) : ""), element("td", {}, routeText(route)));
  });
}

function routeText([entry, score, matched]) {
  if (entry === null && matched === null) return MISSING;
  return `entry ${entry === null ? MISSING : entry}, score ${shown(score)}, ${matched ? "acted" : "did not act"}`;
}

// --- Together --------------------------------------------------------------------------------------------

function show() {
  offerSettings();
  offerScores();
  offerMethods();
  drawChart();
  offerCaseFilters();
  page = 0;
  showCases();
}

for (const id of ["model", "dataset", "protocol"]) at(id).addEventListener("change", show);
for (const id of ["score", "axis"]) at(id).addEventListener("change", drawChart);
for (const id of ["case-method", "case-family", "case-outcome", "case-router", "case-search"]) {
  at(id).addEventListener("input", () => {
    page = 0;
    showCases();
  });
}
for (const [id, by] of [["previous", -1], ["next", 1]]) {
  at(id).addEventListener("click", () => {
    page += by;
    showCases();
    at("cases").scrollIntoView();
  });
}
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
at("chart").addEventListener("pointermove", (event) => point(nearest(event)));
at("chart").addEventListener("pointerleave", () => point(null));
at("chart").addEventListener("keydown", step);
let drawnWidth = 0;
new ResizeObserver(() => {
  const width = at("chart").clientWidth;
  if (width !== drawnWidth) requestAnimationFrame(drawChart);
  drawnWidth = width;
}).observe(at("chart"));
addEventListener("beforeprint", () => at("values").setAttribute("open", ""));
show();
