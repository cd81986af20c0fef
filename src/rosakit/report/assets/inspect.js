"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (tag, text, cls) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
};
const count = data.tokens.length, W = data.window;
const shown = (s) => s.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
let trace = 0, token = -1, pinned = false;

// Colours: a fixed ramp (dark blue, teal, yellow), so that light and dark pages read alike.
const RAMP = [[48, 46, 120], [33, 110, 142], [40, 160, 120], [150, 205, 70], [253, 231, 37]];
function ramp(x) {
  const p = Math.min(Math.max(x, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(p), RAMP.length - 2), f = p - i;
  return RAMP[i].map((v, c) => Math.round(v + (RAMP[i + 1][c] - v) * f));
}
const counted = (t, i) => t.position[i] >= 0 && (!at("far").checked || beyond(t, i));
// Position i sees i - W + 1 onwards: what was read W or more back is out of sight.
const beyond = (t, i) => W !== null && t.position[i] >= data.sink_tokens && i - t.position[i] >= W;
function value(i) {
  const t = data.traces[trace], kind = at("colour").value;
  if (kind === "surprise") return data.log_prob[i] === null ? null : -data.log_prob[i] / 10;
  if (kind === "gain") {
    const b = data.base_log_prob[i];
    return b === null || b === undefined ? null : (data.log_prob[i] - b) / 5;
  }
  if (!counted(t, i)) return null;
  if (kind === "length") return Math.log2(1 + t.length[i]) / 6;
  if (kind === "weight") return t.weight[i];
  return Math.log2(1 + i - t.position[i]) / Math.log2(1 + count);
}

const spans = data.tokens.map((piece, i) => {
  const e = make("span", piece);
  e.dataset.i = i;
  return e;
});
at("text").append(...spans);

function paint() {
  for (let i = 0; i < count; i++) {
    const x = value(i);
    const c = x === null ? null : x < 0 ? [229, 57, 53] : ramp(x);
    spans[i].style.background = c ? `rgba(${c}, ${x < 0 ? Math.min(.7, -x) : .12 + .4 * Math.min(1, x)})` : "";
  }
}

function show(i) {
  for (const e of document.querySelectorAll("#text .here, #text .hit, #text .next, #text .suffix"))
    e.classList.remove("here", "hit", "next", "suffix");
  token = i;
  const panel = at("panel");
  panel.replaceChildren();
  if (i < 0) {
    panel.append(make("p", "Point at a token, or click into the text and use the arrow keys. A click holds a token."));
    panel.append(legend());
    return;
  }
  const t = data.traces[trace];
  spans[i].classList.add("here");
  panel.append(make("h2", `position ${i}`));
  panel.append(line("token", shown(data.tokens[i])));
  if (i + 1 < count) panel.append(line("followed by", `${shown(data.tokens[i + 1])}   ${chance(data.log_prob[i + 1])}`));
  if (data.base_log_prob.length && i + 1 < count) panel.append(line("without the route", chance(data.base_log_prob[i + 1])));
  if (counted(t, i)) {
    const p = t.position[i], n = Math.min(t.length[i], p);
    for (let r = 0; r < n; r++) {
      if (t.kind !== "layer") spans[i - r].classList.add("suffix");
      spans[p - 1 - r].classList.add("hit");
    }
    spans[p].classList.add("next");
    panel.append(line("read", `${shown(data.tokens[p])}   at ${p}${i + 1 < count && data.tokens[p] === data.tokens[i + 1] ? ", right" : ""}`));
    panel.append(line("match length", String(t.length[i])));
    panel.append(line("distance", `${i - p}${beyond(t, i) ? ", beyond the window" : ""}`));
    panel.append(line(t.kind === "candidate" ? "gate" : t.kind === "layer" ? "routes that agree" : "weight", `${(100 * t.weight[i]).toFixed(1)}%`));
    const from = Math.max(0, p - n - 6);
    panel.append(line("there", data.tokens.slice(from, p).join("") + "▸" + data.tokens.slice(p, p + 6).join("")));
  } else panel.append(make("p", "nothing was read here by this reader", "soft"));
  panel.append(others(i), legend());
}
function line(name, text) {
  const p = make("p"), c = make("code", text);
  p.append(make("span", name + ": ", "soft"), c);
  return p;
}
const chance = (lp) => (lp === null || lp === undefined ? "" : `p = ${(100 * Math.exp(lp)).toFixed(1)}%`);
function others(i) {
  const rows = data.traces.map((t, k) => [t, k]).filter(([t]) => t.position[i] >= 0 && t.kind !== "route");
  const table = make("table"), head = make("tr");
  if (!rows.length) return table;
  for (const h of ["reader", "read", "length", "back", ""]) head.append(make("th", h));
  const top = make("thead");
  top.append(head);
  table.append(top);
  for (const [t, k] of rows.slice(0, 12)) {
    const row = make("tr", undefined, k === trace ? "best" : "");
    for (const v of [t.name.replace("token route, ", ""), shown(data.tokens[t.position[i]]), t.length[i], i - t.position[i], `${(100 * t.weight[i]).toFixed(0)}%`])
      row.append(make("td", String(v)));
    table.append(row);
  }
  return table;
}
function legend() {
  const p = make("p", undefined, "soft");
  for (const [cls, text] of [["suffix", "what was just seen"], ["hit", "the same, earlier"], ["next", "what followed it, which is read"]]) {
    const key = make("span", text, "key");
    key.style.background = `var(--${cls})`;
    key.style.color = "var(--fg)";
    p.append(key, " ");
  }
  return p;
}

// One row a reader; single routes are left to the selection.
const rows = data.traces.map((t, k) => k).filter((k) => data.traces[k].kind !== "route");
function drawMap() {
  const c = at("map"), g = c.getContext("2d"), high = rows.length > 12 ? 10 : 16;
  c.width = count;
  c.height = Math.max(1, rows.length * high);
  c.style.height = `${c.height}px`;
  rows.forEach((k, y) => {
    const t = data.traces[k];
    for (let i = 0; i < count; i++) {
      if (!counted(t, i)) continue;
      g.fillStyle = `rgb(${ramp(Math.log2(1 + i - t.position[i]) / Math.log2(1 + count))})`;
      g.fillRect(i, y * high, 1, high - 1);
    }
  });
  c.onclick = (e) => {
    const box = c.getBoundingClientRect();
    trace = rows[Math.min(rows.length - 1, Math.floor(((e.clientY - box.top) / box.height) * rows.length))];
    at("trace").value = trace;
    pinned = true;
    refresh(Math.min(count - 1, Math.floor(((e.clientX - box.left) / box.width) * count)));
    spans[token].scrollIntoView({ block: "center" });
  };
  at("scale").textContent = `Rows from the top: ${rows.map((k) => data.traces[k].name).join(" · ")}. Window: ${W === null ? "none" : W + " tokens"}.`;
}
function healthTable() {
  const places = Object.keys(data.health), names = [...new Set(places.flatMap((p) => Object.keys(data.health[p])))];
  const table = make("table"), head = make("tr"), top = make("thead"), body = make("tbody");
  head.append(make("th", "place"));
  for (const n of names) head.append(make("th", n.replace(/_/g, " ")));
  top.append(head);
  for (const p of places) {
    const row = make("tr");
    row.append(make("td", p));
    for (const n of names) {
      const v = data.health[p][n];
      row.append(make("td", v === undefined ? "" : /length|entropy/.test(n) ? v.toFixed(2) : `${(100 * v).toFixed(1)}%`));
    }
    body.append(row);
  }
  table.append(top, body);
  at("health").append(table);
  for (const [place, messages] of Object.entries(data.faults))
    for (const m of messages) at("faults").append(make("p", `${place}: ${m}`, "fault"));
}
function refresh(i) {
  paint();
  show(i === undefined ? token : i);
}

data.traces.forEach((t, k) => at("trace").append(new Option(t.name, k)));
for (const id of ["trace", "colour", "far"])
  at(id).addEventListener("change", () => {
    trace = Number(at("trace").value);
    if (id === "far") drawMap();
    refresh();
  });
at("text").addEventListener("mouseover", (e) => {
  if (!pinned && e.target.dataset.i !== undefined) show(Number(e.target.dataset.i));
});
at("text").addEventListener("click", (e) => {
  const i = e.target.dataset.i;
  pinned = i !== undefined && !(pinned && Number(i) === token);
  show(pinned ? Number(i) : -1);
});
at("text").addEventListener("keydown", (e) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20 }[e.key];
  if (!step) return;
  e.preventDefault();
  pinned = true;
  show(Math.min(count - 1, Math.max(0, token + step)));
  spans[token].scrollIntoView({ block: "nearest" });
});
at("title").textContent = document.title;
at("about").textContent = Object.entries(data.settings).map(([k, v]) => `${k}: ${v}`).join(" · ");
// A link may name what to show: #reader=0&token=12
const link = new URLSearchParams(location.hash.slice(1));
if (link.has("reader")) at("trace").value = trace = Math.min(data.traces.length - 1, Math.max(0, Number(link.get("reader")) || 0));
if (link.has("token")) {
  pinned = true;
  token = Math.min(count - 1, Math.max(0, Number(link.get("token")) || 0));
}
drawMap();
healthTable();
refresh();
if (token >= 0) spans[token].scrollIntoView({ block: "center" });
window.scrollTo(0, 0);
document.body.dataset.ready = "yes";
