"use strict";
const runs = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (tag, text, cls) => {
  const e = document.createElement(tag);
  if (text !== undefined && text !== null) e.textContent = text;
  if (cls) e.className = cls;
  return e;
};
const svg = (tag, values, text) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(values)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
};
const COLOURS = { full: "#777777", "full+trained": "#aaaaaa", window: "#d62728", "window+sinks": "#ff9f40", control: "#1f77b4", rosa: "#2ca02c" };
const names = [...new Set(runs.flatMap((r) => Object.keys(r.result.variants)))];
// Others: hues a golden angle apart, so that neighbours in the legend differ, and strokes in turn.
const spare = names.filter((n) => !COLOURS[n]);
const STROKES = ["", "2 3", "8 3", "8 3 2 3"];
const colour = (n) => COLOURS[n] || `hsl(${(270 + 137.5 * spare.indexOf(n)) % 360} 60% 47%)`;
const stroke = (n) => (n === "control" ? "6 4" : COLOURS[n] ? "" : STROKES[spare.indexOf(n) % STROKES.length]);
// Kinds of held-out text: the first is the result's own, others lie beside it.
const kinds = ["", ...new Set(runs.flatMap((r) => Object.values(r.result.variants).flatMap((v) => Object.keys(v.other || {}))))];
const called = (kind) => kind || runs[0].result.settings.kind || "held-out text";
const positions = (v, kind) => (kind ? ((v.other || {})[kind] || { ppl_by_position: {} }) : v).ppl_by_position;
const each = (f) => runs.forEach((r) => Object.entries(r.result.variants).forEach(([n, v]) => f(r, n, v)));
const number = (x, d = 2) => (x === null || x === undefined ? "" : x.toFixed(d));

function curves(kind) {
  // The bare window is worse by so much that nothing else could be seen beside it.
  const kept = (n) => n !== "window" || names.length < 3;
  let low = Infinity, high = -Infinity;
  each((r, n, v) => {
    if (kept(n)) for (const p of Object.values(positions(v, kind))) if (p) (low = Math.min(low, p)), (high = Math.max(high, p));
  });
  if (kinds.length > 1) at("curves").append(make("h3", called(kind)));
  const pad = Math.log(high / low) * 0.06 || 0.1, wide = 420, tall = 330, L = 48, R = 12, T = 26, B = 44;
  const y = (p) => T + (tall - T - B) * (1 - (Math.log(p) - Math.log(low) + pad) / (Math.log(high / low) + 2 * pad));
  for (const run of runs) {
    const box = make("div", undefined, "figure"), s = svg("svg", { width: wide, height: tall, viewBox: `0 0 ${wide} ${tall}`, role: "img" });
    const labels = [...new Set(Object.values(run.result.variants).flatMap((v) => Object.keys(positions(v, kind))))];
    const x = (i) => L + (wide - L - R) * (labels.length < 2 ? 0.5 : (i + 0.5) / labels.length);
    s.append(svg("text", { x: L, y: 15, "font-weight": 600 }, run.name));
    const ticks = [2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 120, 200, 400, 1000].filter((t) => t >= low * 0.95 && t <= high * 1.05);
    for (const t of ticks.length ? ticks : [low, high]) {
      s.append(svg("line", { x1: L, x2: wide - R, y1: y(t), y2: y(t), class: "grid" }));
      s.append(svg("text", { x: L - 6, y: y(t) + 4, "text-anchor": "end", class: "soft" }, +t.toPrecision(3)));
    }
    labels.forEach((l, i) => s.append(svg("text", { x: x(i), y: tall - B + 18, "text-anchor": "middle", class: "soft" }, l)));
    s.append(svg("text", { x: L + (wide - L - R) / 2, y: tall - 8, "text-anchor": "middle", class: "soft" }, "position, tokens"));
    for (const [n, v] of Object.entries(run.result.variants)) {
      if (!kept(n) || !Object.keys(positions(v, kind)).length) continue;
      const points = labels.map((l, i) => [x(i), positions(v, kind)[l]]).filter(([, p]) => p).map(([a, p]) => [a, y(p)]);
      const group = svg("g", { class: "curve" });
      group.dataset.name = n;
      group.append(svg("polyline", { points: points.map((p) => p.join(",")).join(" "), fill: "none", stroke: colour(n), "stroke-width": n === "rosa" ? 3 : 1.8, "stroke-dasharray": stroke(n) }));
      for (const [a, b] of points) group.append(svg("circle", { cx: a, cy: b, r: 3, fill: colour(n) }));
      group.append(svg("title", {}, n));
      s.append(group);
    }
    box.append(s);
    at("curves").append(box);
  }
  legend(names.filter(kept));
}

function legend(shown) {
  const list = make("p", undefined, "legend");
  // Pointing at a name leaves its curves alone in sight.
  const only = (name) => document.querySelectorAll(".curve").forEach((g) => g.classList.toggle("dim", name !== null && g.dataset.name !== name));
  for (const n of shown) {
    const item = make("span"), mark = svg("svg", { width: 30, height: 10 });
    mark.append(svg("line", { x1: 1, x2: 29, y1: 5, y2: 5, stroke: colour(n), "stroke-width": n === "rosa" ? 3 : 2, "stroke-dasharray": stroke(n) }));
    item.append(mark, ` ${n}`);
    item.onmouseenter = () => only(n);
    item.onmouseleave = () => only(null);
    list.append(item, " ");
  }
  at("curves").append(list);
}

function table(id, head, rows) {
  const t = make("table"), top = make("thead"), h = make("tr"), body = make("tbody");
  for (const c of head) h.append(make("th", c));
  top.append(h);
  for (const r of rows) {
    const line = make("tr", undefined, r.best ? "best" : "");
    for (const c of r.cells) line.append(make("td", c));
    body.append(line);
  }
  t.append(top, body);
  at(id).append(t);
}

function variants() {
  const labels = [...new Set(runs.flatMap((r) => Object.values(r.result.variants).flatMap((v) => Object.keys(v.ppl_by_position))))];
  labels.sort((a, b) => parseInt(a) - parseInt(b));
  const scores = [...new Set(runs.flatMap((r) => Object.values(r.result.variants).flatMap((v) => Object.keys(v.scores || {}))))];
  const rows = [];
  each((r, n, v) => {
    const cells = [r.name, n, number(v.ppl), ...labels.map((l) => number(v.ppl_by_position[l])), ...kinds.slice(1).map((k) => number(((v.other || {})[k] || {}).ppl))];
    cells.push(v.niah === null || v.niah === undefined ? "" : `${(100 * v.niah).toFixed(0)}%`);
    for (const s of scores) cells.push(number((v.scores || {})[s], 3));
    cells.push(v.trained_parameters.toLocaleString("en"), v.description);
    rows.push({ cells, best: n === "rosa" });
  });
  table("table", ["run", "variant", "perplexity", ...labels, ...kinds.slice(1).map((k) => `${k}, perplexity`), "needles beyond the window", ...scores.map((s) => s.replaceAll("_", " ")), "trained parameters", "what it is"], rows);
}

// Percent of the perplexity: less is not told from nothing.
const MARGIN = 1;

function gains(kind) {
  const rows = [], labels = [];
  for (const r of runs) {
    const all = r.result.variants;
    for (const [n, v] of Object.entries(all)) {
      // What follows an @ holds for the control too: another budget, another rank.
      const [plain, budget] = n.split("@"), c = (budget && all[`control@${budget}`]) || all.control;
      if (!c || ["control", "full", "window", "window+sinks"].includes(plain)) continue;
      for (const l of Object.keys(positions(c, kind))) if (!labels.includes(l)) labels.push(l);
      rows.push({ r, n, v: positions(v, kind), c: positions(c, kind) });
    }
  }
  if (!rows.length) return at("gains").append(make("p", "no run here was measured with its control", "soft"));
  if (kinds.length > 1) at("gains").append(make("h3", called(kind)));
  table("gains", ["run", "variant", ...labels, "long-range"], rows.map(({ r, n, v, c }) => {
    const change = labels.map((l) => (v[l] && c[l] ? 100 * (v[l] / c[l] - 1) : null));
    const first = change.find((x) => x !== null), last = change.findLast((x) => x !== null);
    const sign = (x) => (x === null ? "" : `${x > 0 ? "+" : ""}${x.toFixed(1)}%`);
    return { best: n === "rosa", cells: [r.name, n, ...change.map(sign), last < first - MARGIN && last < -MARGIN ? "yes" : "no"] };
  }));
}

function heat(title, cells, x, y) {
  const box = make("div", undefined, "figure"), t = make("table"), top = make("tr");
  const xs = [...new Set(cells.map((c) => c[x]))].sort((a, b) => a - b), ys = [...new Set(cells.map((c) => c[y]))].sort((a, b) => a - b);
  box.append(make("p", title));
  top.append(make("th", `${y} \\ ${x}`));
  for (const v of xs) top.append(make("th", v));
  t.append(top);
  for (const v of ys) {
    const row = make("tr");
    row.append(make("td", v));
    for (const u of xs) {
      const found = cells.filter((c) => c[x] === u && c[y] === v), n = found.reduce((s, c) => s + c.samples, 0);
      const cell = make("td");
      if (n) {
        const share = found.reduce((s, c) => s + c.correct, 0) / n;
        cell.textContent = `${(100 * share).toFixed(0)}`;
        cell.title = `${found.reduce((s, c) => s + c.correct, 0)} of ${n}`;
        // Red over yellow to green, by hue; the text stays dark on all of them.
        cell.style.background = `hsl(${120 * share} 60% 62%)`;
        cell.style.color = "#111";
        cell.style.minWidth = "3.2em";
        const small = make("sup", ` ${n}`);
        small.style.opacity = 0.55;
        cell.append(small);
      }
      row.append(cell);
    }
    t.append(row);
  }
  box.append(t);
  return box;
}

function grids() {
  const found = new Map();
  each((r, n, v) => {
    const all = { ...(v.niah_detail ? { needles: { cells: v.niah_detail.cells, axes: ["length", "depth"] } } : {}), ...(v.grids || {}) };
    for (const [kind, g] of Object.entries(all)) {
      const cells = g.cells.map((c) => ({ ...(c.place || {}), ...c }));
      if (!found.has(kind)) found.set(kind, []);
      found.get(kind).push(heat(`${r.name} · ${n}`, cells, g.axes[0], g.axes[1]));
    }
  });
  if (!found.size) at("grids").append(make("p", "no recall task was measured", "soft"));
  for (const [kind, boxes] of found) {
    // Many maps fill many screens: the needles are open, the others a click away.
    const part = make("details");
    part.open = kind === "needles" || found.size < 3;
    part.append(make("summary", kind.replaceAll("_", " ")), ...boxes);
    at("grids").append(part);
  }
}

at("title").textContent = document.title;
at("about").textContent = runs.map((r) => `${r.name}: ${r.result.settings.name || r.result.settings.model || ""}, window ${r.result.settings.window ?? "none"}`).join(" · ");
kinds.forEach(curves);
variants();
kinds.forEach(gains);
grids();
table("origin", ["run", "date", "hardware", "versions", "commit", "seed", "seconds"], runs.map((r) => ({
  cells: [r.name, r.result.date, r.result.hardware.gpu || r.result.hardware.cpu, Object.entries(r.result.versions).map((p) => p.join(" ")).join(", "), (r.result.commit || "").slice(0, 12), String(r.result.seed), String(r.result.seconds)],
})));
document.body.dataset.ready = "yes";
