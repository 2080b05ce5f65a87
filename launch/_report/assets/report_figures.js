"use strict";
// What all figures share, and the learning curves: traces and layout from the data.

const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = { mode: "means", hidden: new Set(), log: new Set() };

function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colour(pair) {
  return pair[dark.matches ? 1 : 0];
}

function groupColour(group) {
  return dark.matches ? group.dark : group.light;
}

function faded(hex, alpha) {
  return hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
}

function axis(more) {
  const line = token("--line");
  return {
    gridcolor: token("--faint"),
    linecolor: line,
    tickcolor: line,
    ticks: "outside",
    ticklen: 4,
    showline: true,
    zeroline: false,
    automargin: true,
    title: { standoff: 8 },
    ...more,
  };
}

function layout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: token("--muted") },
    margin: { l: 48, r: 12, t: 14, b: 40 },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: {
      bgcolor: token("--panel"),
      bordercolor: token("--line"),
      font: { color: token("--ink"), size: 12 },
      align: "left",
    },
    dragmode: "zoom",
    uirevision: "kept",
    ...more,
  };
}

// Linear or logarithmic, from low to high with a margin; decades get the ticks.
function scale(log, low, high) {
  if (!log) {
    const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    return { type: "linear", range: [low - margin, high + margin] };
  }
  const [from, to] = [Math.log10(low), Math.log10(high)];
  const margin = 0.05 * (to - from) || 0.1;
  return {
    type: "log",
    range: [from - margin, to + margin],
    exponentformat: "e",
    ...(to - from > 1.3 && { dtick: 1 }),
  };
}

function ends(values, log) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [log ? 0.1 : 0, 1];
}

// All lines of a group are one trace, with a gap after each: 500 runs stay quick.
function joined(lines, labels, said) {
  const x = [], y = [], text = [];
  for (const line of lines) {
    const steps = data.steps[line.s];
    for (let i = 0; i < steps.length; i++) {
      x.push(steps[i]);
      y.push(line.y[i]);
      text.push(said(labels[line.o], line, i));
    }
    x.push(null);
    y.push(null);
    text.push("");
  }
  return { x, y, text };
}

// On a logarithmic axis an interval that reaches zero ends at the floor.
function bandOf(line, floor) {
  const steps = data.steps[line.s];
  const at = steps.map((_, i) => i).filter((i) => line.h[i] !== null);
  const back = [...at].reverse();
  return {
    x: [...at.map((i) => steps[i]), ...back.map((i) => steps[i])],
    y: [
      ...at.map((i) => line.y[i] + line.h[i]),
      ...back.map((i) => Math.max(line.y[i] - line.h[i], floor)),
    ],
  };
}

function short(value) {
  return value === null ? "" : Number(value.toPrecision(4)).toString();
}

function curveFigure(number) {
  const panel = data.panels[number];
  const means = state.mode === "means" && panel.means.length > 0;
  const lines = means ? panel.means : panel.arms;
  const log = state.log.has(number);
  const few = lines.length <= 12;
  const labels = means ? data.settings : data.arms;
  const said = (label, line, i) =>
    line.h && line.h[i] !== null ? `${label}<br>± ${short(line.h[i])}` : label;
  const bands = [], curves = [];
  const shown = lines.filter((line) => !state.hidden.has(line.g));
  const [low, high] = ends(shown.flatMap((line) => line.y), log);
  data.groups.forEach((group, g) => {
    const own = lines.filter((line) => line.g === g);
    if (state.hidden.has(g) || !own.length) return;
    const tint = groupColour(group);
    if (means && data.alone && own.some((line) => line.h.some((h) => h !== null))) {
      bands.push({
        ...bandOf(own[0], log ? 0.1 * low : -Infinity),
        fill: "toself",
        fillcolor: faded(tint, few ? 0.16 : 0.07),
        line: { width: 0 },
        mode: "lines",
        hoverinfo: "skip",
        name: `${group.label} (95%)`,
      });
    }
    const single = own.every((line) => line.y.length === 1);
    curves.push({
      ...joined(own, labels, said),
      mode: single ? "markers" : "lines",
      connectgaps: false,
      line: { color: tint, dash: group.dash, width: means || few ? 1.8 : 1 },
      marker: { color: tint, size: 6 },
      opacity: means || few ? 1 : 0.7,
      hovertemplate: "%{text}<br>step %{x}: %{y:.5g}<extra></extra>",
      name: group.label,
    });
  });
  return {
    traces: [...bands, ...curves],
    layout: layout({
      xaxis: axis({ title: { text: "step", standoff: 6 } }),
      yaxis: axis({ ...scale(log, low, high), nticks: 6 }),
      uirevision: log,
    }),
  };
}
