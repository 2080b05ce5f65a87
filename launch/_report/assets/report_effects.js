"use strict";
// The figures of the main metric over the settings.

function responseFigure() {
  const found = data.response;
  const traces = [];
  const many = found.series.length > 1;
  const [low, high] = ends(found.series.flatMap((series) => series.x));
  // Beside each other, so that no interval covers another.
  const shifted = (x, s) => {
    const part = 0.007 * (s - (found.series.length - 1) / 2);
    return x.map((value) =>
      found.log ? value * (high / low) ** part : value + part * (high - low),
    );
  };
  found.series.forEach((series, s) => {
    const tints = series.rows.map((row) => colour(data.colours[row]));
    traces.push({
      x: shifted(series.dots[0], s),
      y: series.dots[1],
      mode: "markers",
      marker: { size: 4, color: faded(many ? tints[0] : "#88919a", 0.5) },
      hoverinfo: "skip",
      showlegend: false,
    });
    traces.push({
      x: shifted(series.x, s),
      y: series.y,
      text: series.t,
      mode: found.names.length ? "markers" : "lines+markers",
      line: { color: many ? tints[0] : token("--line"), width: 1.6 },
      marker: { size: 9, color: tints, line: { width: 1, color: token("--panel") } },
      error_y: {
        type: "data",
        array: series.h.map((h) => h ?? 0),
        color: many ? tints[0] : token("--muted"),
        thickness: 1.2,
        width: 3,
      },
      hovertemplate: "%{text}<extra></extra>",
      name: series.label,
      showlegend: many,
    });
  });
  const names = found.names.length
    ? { tickvals: found.names.map((_, i) => i), ticktext: found.names, range: [-0.5, found.names.length - 0.5] }
    : scale(found.log, low, high);
  const values = new Set(found.series.flatMap((series) => series.x));
  if (!found.names.length && values.size <= 6) {
    names.tickvals = [...values];
    names.ticktext = [...values].map(short);
  }
  return {
    traces,
    layout: layout({
      showlegend: many,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: token("--ink") } },
      xaxis: axis({ ...names, title: { text: found.name, standoff: 8 } }),
      yaxis: axis({ nticks: 7 }),
    }),
  };
}

function heatFigure() {
  const found = data.heat;
  const [low, high] = found.limits;
  const cells = found.x.length * found.y.length;
  const shapes = found.best.map(([x, y]) => ({
    type: "rect",
    x0: x - 0.5,
    x1: x + 0.5,
    y0: y - 0.5,
    y1: y + 0.5,
    line: { color: token("--ink"), width: 2.5 },
  }));
  const ticks = (names) => ({
    tickvals: names.map((_, i) => i),
    ticktext: names,
    showgrid: false,
    showline: false,
    ticks: "",
  });
  return {
    height: Math.max(330, Math.min(110 + 40 * found.y.length, 760)),
    traces: [
      {
        type: "heatmap",
        z: found.z,
        text: found.cells,
        hovertext: found.t,
        hovertemplate: "%{hovertext}<extra></extra>",
        texttemplate: cells <= 200 ? "%{text}" : "",
        colorscale: "Viridis",
        reversescale: !data.higher,
        zmin: low,
        zmax: high,
        xgap: 2,
        ygap: 2,
        hoverongaps: true,
        colorbar: { thickness: 12, outlinewidth: 0, len: 1, nticks: 5 },
      },
    ],
    layout: layout({
      shapes,
      xaxis: axis({ ...ticks(found.x), title: { text: found.names[0], standoff: 8 } }),
      yaxis: axis({ ...ticks(found.y), autorange: "reversed", title: { text: found.names[1], standoff: 8 } }),
    }),
  };
}

function parallelFigure() {
  const found = data.parallel;
  const last = found.lines.length - 1;
  const width = found.lines.length > 100 ? 1 : 1.5;
  const bins = new Map();
  found.lines.forEach((line, i) => {
    const bin = i === last ? 99 : Math.round(line.c * 20);
    if (!bins.has(bin)) bins.set(bin, { x: [], y: [], text: [] });
    const trace = bins.get(bin);
    line.p.forEach((place, at) => {
      trace.x.push(at);
      trace.y.push(place);
      trace.text.push(line.t);
    });
    trace.x.push(null);
    trace.y.push(null);
    trace.text.push("");
  });
  const traces = [...bins.entries()].sort(([a], [b]) => a - b).map(([bin, trace]) => ({
    ...trace,
    mode: "lines",
    connectgaps: false,
    line: {
      width: bin === 99 ? 3.5 : width,
      color: colour(found.ramp[bin === 99 ? Math.round(found.lines[last].c * 20) : bin]),
    },
    opacity: bin === 99 ? 1 : 0.75,
    hovertemplate: "%{text}<extra></extra>",
  }));
  const notes = [];
  found.axes.forEach((one, at) => {
    notes.push({ x: at, y: 1.05, text: `<b>${one.name}</b>`, yanchor: "bottom", xanchor: "center", font: { color: token("--ink"), size: 13 } });
    for (const [place, text] of one.ticks) {
      notes.push({ x: at, y: place, text, xanchor: "left", xshift: 4, bgcolor: faded(token("--panel"), 0.8), font: { size: 11 } });
    }
  });
  const lowest = found.axes.some((one) => one.ticks.some(([place]) => place < 0)) ? -0.18 : -0.06;
  return {
    traces,
    layout: layout({
      margin: { l: 20, r: 20, t: 20, b: 10 },
      annotations: notes.map((note) => ({ showarrow: false, ...note })),
      shapes: found.axes.map((_, at) => ({ type: "line", x0: at, x1: at, y0: lowest + 0.04, y1: 1.02, layer: "below", line: { color: token("--line"), width: 1.5 } })),
      xaxis: { visible: false, range: [-0.35, found.axes.length - 0.55], fixedrange: true },
      yaxis: { visible: false, range: [lowest, 1.14], fixedrange: true },
    }),
  };
}
