"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const figures = JSON.parse(byId("figures").textContent);
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };
  const canHover = matchMedia("(hover: hover)").matches;
  const sizes = new Map();
  root.classList.add("js");

  // Colours are names of CSS variables until they are drawn.
  function coloured(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "number" && typeof value[value.length - 1] === "number" ? value : value.map((item) => coloured(item, style));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
    }
    return value;
  }

  const textWidth = (() => {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "12px system-ui, sans-serif";
    return (html) => pen.measureText(html.replace(/&[a-z]+;/g, "x")).width + 8;
  })();

  // What was done when: a thin line to a label above the plot, in as many rows as it takes for none to cover another.
  function mark(layout, width) {
    const { marks, mark: tone } = layout.meta;
    const inner = width - layout.margin.l - layout.margin.r;
    const [from, to] = layout.xaxis.range;
    const ends = [];
    const placed = [];
    for (const [at, text] of marks) {
      const x = ((at - from) / (to - from)) * inner;
      if (!(x >= 0 && x <= inner + 1)) continue;
      const wide = textWidth(text);
      const start = Math.max(x - wide, -layout.margin.l + 4);
      let row = 0;
      while (ends.slice(row).some((end) => end > start)) row += 1;
      const shown = row < 4;
      if (shown) ends[row] = Math.max(start + wide, x);
      for (let i = 0; i < row && shown; i += 1) ends[i] = ends[i] || 0;
      placed.push({ at: x / inner, text, row: shown ? row : -1, right: start + wide - x });
    }
    const rows = ends.length;
    layout.margin.t = 10 + 16 * rows;
    const plot = layout.height - layout.margin.t - layout.margin.b;
    for (const { at, text, row, right } of placed) {
      const top = 1 + (16 * row + 4) / plot;
      layout.shapes.push({
        type: "line", xref: "paper", x0: at, x1: at, yref: "paper", y0: 0, y1: row < 0 ? 1 : top, layer: "above", opacity: 0.5,
        line: { color: tone.line, width: 1 },
      });
      if (row >= 0) {
        layout.annotations.push({
          x: at, xref: "paper", yref: "paper", y: top, xanchor: "right", yanchor: "bottom", xshift: right + 3, yshift: -6, text, showarrow: false,
          font: { size: 12, color: tone.line },
        });
      }
    }
  }

  // Names beside their points: of the places around each the one that covers least; none where all are taken.
  function name(layout, data, width) {
    const { labels, lines } = layout.meta;
    const left = layout.margin.l;
    const inner = width - left - layout.margin.r;
    const tall = layout.height - layout.margin.t - layout.margin.b;
    const along = (axis, value, size) => ((Math.log10(value) - axis.range[0]) / (axis.range[1] - axis.range[0])) * size;
    const spot = (x, y) => [along(layout.xaxis, x, inner), tall - along(layout.yaxis, y, tall)];
    const points = data.filter((t) => t.mode === "markers").flatMap((t) => t.x.map((x, i) => spot(x, t.y[i])));
    for (const [x0, y0, x1, y1] of lines) {
      const [ax, ay] = spot(x0, y0);
      const [bx, by] = spot(x1, y1);
      for (let i = 0; i <= 60; i += 1) points.push([ax + ((bx - ax) * i) / 60, ay + ((by - ay) * i) / 60]);
    }
    const boxes = [];
    const cost = (box) => {
      const [x0, y0, x1, y1] = box;
      let sum = 100 * (Math.max(0, -x0) + Math.max(0, x1 - inner - 10) + Math.max(0, -y0) + Math.max(0, y1 - tall));
      for (const [x, y] of points) if (x > x0 - 7 && x < x1 + 7 && y > y0 - 5 && y < y1 + 5) sum += 40;
      for (const [a0, b0, a1, b1] of boxes) {
        sum += 2 * Math.max(0, Math.min(x1, a1) - Math.max(x0, a0)) * Math.max(0, Math.min(y1, b1) - Math.max(y0, b0));
      }
      return sum;
    };
    for (const [x, y, text, color] of labels) {
      const [px, py] = spot(x, y);
      const wide = textWidth(text);
      let best = null;
      for (const reach of [12, 20, 32, 48]) {
        for (const [dx, dy] of [[1, 0], [-1, 0], [0.7, 0.9], [-0.7, 0.9], [0.7, -0.9], [-0.7, -0.9], [0, 1.3], [0, -1.3]]) {
          const cx = px + dx * reach + (Math.sign(dx) * wide) / 2;
          const cy = py + dy * reach;
          const box = [cx - wide / 2, cy - 8, cx + wide / 2, cy + 8];
          const sum = cost(box) + reach;
          if (best === null || sum < best.sum) best = { sum, box, cx, cy };
        }
      }
      if (best.sum > 110) continue;
      boxes.push(best.box);
      layout.annotations.push({
        x: Math.log10(x), y: Math.log10(y), xshift: best.cx - px, yshift: py - best.cy, xanchor: "center", yanchor: "middle",
        text, showarrow: false, font: { size: 12, color },
      });
    }
  }

  // Long names of rows break where there is no room beside the plot.
  function rows(layout, box, width) {
    let names = layout.meta.rows;
    const widest = () => Math.max(...names.flatMap((text) => text.split("<br>").map(textWidth)));
    if (widest() > 0.4 * width) {
      names = names.map((text) => text.replace(" · ", "<br>"));
      layout.height = 76 + 38 * names.length;
    } else {
      layout.height = 76 + 26 * names.length;
    }
    box.style.minHeight = `${layout.height}px`;
    layout.height = box.clientHeight;
    layout.yaxis.ticktext = names;
    layout.margin.l = Math.min(widest() + 8, 0.55 * width);
  }

  function draw(key) {
    const box = byId(key);
    const width = box.clientWidth;
    if (!width) return;
    sizes.set(key, [width, box.clientHeight]);
    const { data, layout } = coloured(figures[key], getComputedStyle(root));
    layout.width = width;
    layout.height = box.clientHeight;
    layout.shapes = [...(layout.shapes || [])];
    layout.annotations = [...(layout.annotations || [])];
    layout.margin = { ...layout.margin };
    const meta = layout.meta || {};
    if (width < 420) layout.margin.r = 10;
    if (meta.rows) rows(layout, box, width);
    if (meta.marks) mark(layout, width);
    if (meta.labels) name(layout, data, width);
    delete layout.meta;
    const displayModeBar = canHover && !root.classList.contains("picture") ? "hover" : false;
    window.Plotly.react(box, data, layout, { ...config, displayModeBar });
    box.dataset.drawn = "yes";
  }

  const drawAll = () => Object.keys(figures).filter((key) => sizes.has(key)).forEach(draw);
  const pause = () => new Promise((done) => { setTimeout(done, 0); });

  async function unpacked(base64, kind) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream)[kind]();
  }

  // The link holds the lines compressed; here they can be had as they were.
  async function unpackLink() {
    const link = byId("raw");
    const blob = await unpacked(link.href.slice(link.href.indexOf(",") + 1), "blob");
    link.href = URL.createObjectURL(new Blob([blob], { type: "application/x-ndjson" }));
    link.download = "results.jsonl";
  }

  async function start() {
    const script = document.createElement("script");
    script.textContent = await unpacked(byId("library").textContent, "text");
    document.head.append(script);
    if (!window.Plotly) throw new Error("the drawing library did not start");
    const resized = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        const [wide, tall] = sizes.get(target.id) || [0, 0];
        const changed = Math.abs(target.clientWidth - wide) > 1 || Math.abs(target.clientHeight - tall) > 1;
        if (target.clientWidth && changed) draw(target.id);
      }
    });
    for (const key of Object.keys(figures)) {
      draw(key);
      resized.observe(byId(key));
      await pause();
    }
    await unpackLink();
    root.dataset.ready = "yes";
  }

  const opened = [];
  function paper() {
    root.classList.add("paper");
    document.querySelectorAll("details:not([open])").forEach((d) => { d.open = true; opened.push(d); });
    drawAll();
  }
  function screen() {
    root.classList.remove("paper");
    opened.splice(0).forEach((d) => { d.open = false; });
    drawAll();
  }
  const pictured = () => root.classList.toggle("picture", location.hash === "#picture");

  if (innerWidth < 760) document.querySelectorAll("details[open]").forEach((d) => { d.open = false; });
  pictured();
  addEventListener("hashchange", pictured);
  addEventListener("beforeprint", paper);
  addEventListener("afterprint", screen);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  start().catch((error) => {
    const note = byId("trouble");
    note.textContent = `Charts could not be drawn (${error.message}). Every number is in the tables below.`;
    note.hidden = false;
    root.classList.remove("js");
    root.dataset.ready = "no";
  });
})();
