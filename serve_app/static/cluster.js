// The cluster page: units, their ranks, and where the rows of each expert layer go.
import { cluster, Failure, info, takeKeyFromAddress } from "./api.js";
import { h, shell } from "./dom.js";
import { number, t } from "./i18n.js";

const EVERY_MS = 2000;
const UNEVEN = 1.25; // a layer whose busiest rank has this much over the mean is marked
const HOT = 3; // times the mean: the strongest colour
const $ = (id) => document.getElementById(id);
const orders = new Map(); // unit -> "expert" or "rank", as the viewer chose
let seen = null;

const seconds = (value) => (value < 1 ? t("ms", { n: number(Math.round(value * 1e4) / 10) }) : t("seconds", { n: number(Math.round(value * 10) / 10) }));
const times = (value) => `${value.toFixed(2)}×`;
const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
const sum = (values) => values.reduce((a, b) => a + b, 0);

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; value >= 1024 && i < units.length - 1; i += 1) value /= 1024;
  return `${number(Math.round(value * 10) / 10)} ${units[i]}`;
}

function drawTotals() {
  const ranks = seen.units.flatMap((unit) => unit.ranks.map((rank) => ({ ...rank, role: unit.role })));
  const held = sum(ranks.map((r) => r.pages_held));
  const all = sum(ranks.map((r) => r.pages_total));
  const fact = (name, value) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, value));
  $("totals").replaceChildren(
    fact("unitCount", number(seen.units.length)),
    fact("rankCount", number(ranks.length)),
    fact("running", number(sum(ranks.filter((r) => r.role === "decode").map((r) => r.running)))),
    fact("queued", number(seen.waiting + sum(ranks.map((r) => r.waiting)))),
    fact("kvUsed", share(held, all)),
    fact("rowsPerSecond", number(Math.round(sum(ranks.map((r) => r.rows_per_s))))),
  );
  $("problems").replaceChildren(...seen.problems.map((sentence) => h("li", {}, sentence)));
  $("problems").hidden = !seen.problems.length;
}

function rankRow(rank, exchanges) {
  const engine = rank.pages_total > 0;
  const spent = rank.exchange_seconds;
  const waits = (spent.counts ?? 0) + (spent.dispatch ?? 0) + (spent.return ?? 0);
  const drafts = rank.drafted ? ` (${share(rank.accepted, rank.drafted)})` : "";
  const cell = (text) => h("td", {}, text);
  return h("tr", {},
    h("td", { title: rank.name }, h("span", { class: rank.idle ? "busy idle" : "busy" }), rank.place),
    engine ? cell(number(rank.running)) : cell("–"),
    engine ? cell(number(rank.waiting)) : cell("–"),
    engine ? h("td", {}, share(rank.pages_held, rank.pages_total), h("meter", { value: rank.pages_held, max: rank.pages_total, "aria-label": t("kvUsed") })) : cell("–"),
    engine ? cell(number(Math.round(rank.rows_per_s))) : cell("–"),
    engine ? cell(rank.step_s ? seconds(rank.step_s) : "–") : cell("–"),
    engine ? cell(number(rank.steps) + drafts) : cell(number(rank.steps)),
    ...(exchanges ? [cell(seconds(spent.experts ?? 0)), cell(seconds(waits)), cell(bytes(rank.exchange_bytes))] : []),
    h("td", { class: "where", title: rank.where }, rank.idle ? t("idle") : `${rank.where}, ${seconds(rank.since_s)}`),
  );
}

function rankTable(unit) {
  const exchanges = unit.ranks.some((rank) => Object.keys(rank.exchange_seconds).length);
  const names = ["rank", "running", "queued", "kvPages", "rowsPerSecond", "stepTime", "stepsDrafts", ...(exchanges ? ["expertTime", "waitTime", "sent"] : [])];
  const head = h("tr", {}, ...names.map((name) => h("th", { scope: "col" }, t(name))), h("th", { scope: "col", class: "where" }, t("where")));
  return h("div", { class: "wide", tabIndex: 0, role: "region", "aria-label": t("ranks") }, h("table", { class: "ranks" }, h("thead", {}, head), h("tbody", {}, ...unit.ranks.map((rank) => rankRow(rank, exchanges)))));
}

/** What a cell stands for: by expert, or by slot, in the order of the ranks that hold them. */
function cells(experts, order) {
  const count = experts.rows[0].length;
  return experts.layers.map((layer, row) => {
    const mean = sum(experts.rows[row]) / count;
    const copies = new Array(count).fill(0);
    for (const expert of experts.slots[row]) copies[expert] += 1;
    const of = (expert, part) => ({ layer, expert, load: mean ? experts.rows[row][expert] / part / mean : 0, copies: copies[expert] });
    if (order === "rank") return experts.slots[row].map((expert, slot) => ({ ...of(expert, copies[expert]), holder: Math.floor(slot / experts.slots_per_holder) }));
    return experts.rows[row].map((_, expert) => of(expert, 1));
  });
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const element = h("span", { class: "visually-hidden" });
  document.body.append(element);
  const resolved = ["--raised", "--accent", "--bad"].map((name) => {
    element.style.color = style.getPropertyValue(name) && `var(${name})`;
    return rgb(getComputedStyle(element).color);
  });
  element.remove();
  return resolved;
}

/** From nothing over the mean to HOT times the mean. */
function colour([cold, mean, hot], load) {
  const mix = (a, b, x) => a.map((value, i) => Math.round(value + (b[i] - value) * x));
  return load <= 1 ? mix(cold, mean, load) : mix(mean, hot, Math.min(1, (load - 1) / (HOT - 1)));
}

function paint(canvas, table) {
  canvas.width = table[0].length;
  canvas.height = table.length;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const scale = colours();
  table.flat().forEach((cell, i) => image.data.set([...colour(scale, cell.load), 255], 4 * i));
  context.putImageData(image, 0, 0);
}

function heatMap(unit) {
  const experts = unit.experts;
  const order = orders.get(unit.unit) ?? "expert";
  const table = cells(experts, order);
  const height = Math.max(9, Math.min(20, Math.round(420 / experts.layers.length)));
  const canvas = h("canvas", { role: "img", "aria-label": t("heatLabel", { overall: times(experts.overall), worst: times(Math.max(...experts.imbalance)) }) });
  canvas.style.height = `${height * experts.layers.length}px`;
  paint(canvas, table);
  const tip = $("tip");
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = table[Math.floor(((event.clientY - box.top) / box.height) * table.length)];
    const cell = row?.[Math.floor(((event.clientX - box.left) / box.width) * row.length)];
    tip.hidden = !cell;
    if (!cell) return;
    const at = experts.slots[experts.layers.indexOf(cell.layer)];
    const homes = new Set(at.flatMap((expert, slot) => (expert === cell.expert ? [experts.holders[Math.floor(slot / experts.slots_per_holder)]] : [])));
    tip.textContent = t("heatCell", { layer: cell.layer, expert: cell.expert, load: times(cell.load), homes: [...homes].join(", ") });
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 270)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  const column = (name, values) => {
    const box = h("div", { class: name }, ...values);
    box.style.gridAutoRows = `${height}px`;
    return box;
  };
  const every = height < 12 ? 2 : 1;
  const rows = [
    column("layers", experts.layers.map((layer, i) => h("span", {}, i % every ? "" : String(layer)))),
    canvas,
    column("balances", experts.imbalance.map((value, i) => h("span", { class: value > UNEVEN ? "uneven" : "" }, i % every && value <= UNEVEN ? "" : times(value)))),
  ];
  const head = h("span", {}, t("layer"));
  const axis = order === "rank" ? h("div", { class: "holders" }, ...experts.holders.map((name) => h("span", { title: name }, experts.holders.length > 16 ? name.replace(/\D+/, "") : name))) : h("span", {}, t("expertAxis", { n: experts.rows[0].length }));
  return h("div", { class: "heat" }, head, axis, h("span", {}, t("maxMean")), ...rows);
}

function legend() {
  const canvas = h("canvas", { "aria-hidden": "true" });
  paint(canvas, [Array.from({ length: 140 }, (_, i) => ({ load: (i / 139) * HOT }))]);
  return h("p", { class: "legend" }, "0", canvas, t("legend", { hot: HOT }));
}

function expertSection(unit) {
  const experts = unit.experts;
  if (!experts) return [];
  const total = sum(experts.rows.map(sum));
  const button = (order, name) => h("button", { type: "button", "aria-pressed": String((orders.get(unit.unit) ?? "expert") === order), onclick: () => { orders.set(unit.unit, order); draw(); } }, t(name));
  const head = h("div", { class: "experts-head" }, h("h3", {}, t("expertRows")), h("div", { class: "choice", role: "group", "aria-label": t("order") }, button("expert", "byExpert"), button("rank", "byRank")));
  const facts = h("p", { class: "small soft" }, t("placementFacts", { version: experts.version, slots: experts.slots_per_holder, holders: experts.holders.length, overall: times(experts.overall) }));
  if (!total) return [head, facts, h("p", { class: "soft" }, t("noRows"))];
  return [head, facts, heatMap(unit), legend()];
}

function unitCard(unit) {
  const kinds = Object.entries(unit.wanted).filter(([, wanted]) => wanted);
  const present = (kind) => unit.ranks.filter((rank) => rank.place.startsWith(kind)).length;
  const counts = kinds.map(([kind, wanted]) => t(kind === "expert" ? "expertRanks" : "attentionRanks", { n: present(kind), of: wanted }));
  const deaths = unit.deaths ? [t("deaths", { n: unit.deaths })] : [];
  return h("section", { class: "unit", "aria-label": unit.unit },
    h("header", {}, h("h2", {}, unit.unit), h("span", { class: "badge" }, t(unit.role === "prefill" ? "prefill" : "decode")), h("span", { class: "small soft" }, [...counts, ...(unit.epoch >= 0 ? [t("epoch", { n: unit.epoch })] : []), ...deaths].join(" · "))),
    ...(unit.problems.length ? [h("ul", { class: "problems" }, ...unit.problems.map((sentence) => h("li", {}, sentence)))] : []),
    rankTable(unit), ...expertSection(unit),
  );
}

function draw() {
  document.title = `${t("cluster")} · Rayseek`;
  if (!seen) return;
  drawTotals();
  const places = () => [...document.querySelectorAll("#units button, #units .wide")];
  const before = places().map((element) => [element === document.activeElement, element.scrollLeft]);
  $("units").replaceChildren(...(seen.units.length ? seen.units.map(unitCard) : [h("p", { class: "soft" }, t("noUnits"))]));
  places().forEach((element, i) => {
    if (before[i]?.[0]) element.focus();
    element.scrollLeft = before[i]?.[1] ?? 0;
  });
  $("units").setAttribute("aria-busy", "false");
  $("fresh").textContent = t("asOf", { time: new Date(seen.time * 1000).toLocaleTimeString() });
}

async function look() {
  if (document.hidden) return;
  try {
    seen = await cluster();
    $("sign-in").hidden = $("failed").hidden = true;
    draw();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    $("sign-in").hidden = error.kind !== "key";
    $("failed").hidden = error.kind === "key";
    $("failed").textContent = t("clusterFailed");
  }
}

takeKeyFromAddress();
shell(draw);
await info().catch(() => {});
look();
setInterval(look, EVERY_MS);
document.addEventListener("visibilitychange", look);
