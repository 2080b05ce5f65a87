"use strict";
// Draws what is in view first, the rest when the page is at rest.

const FIGURES = {
  curve: (place) => curveFigure(Number(place.dataset.panel)),
  response: responseFigure,
  heat: heatFigure,
  parallel: parallelFigure,
};
const OPTIONS = {
  displaylogo: false,
  responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d"],
};
const places = [...document.querySelectorAll(".plot")];
const waiting = new Set(places);

function draw(place) {
  waiting.delete(place);
  const figure = FIGURES[place.dataset.figure](place);
  if (figure.height) place.style.height = `${figure.height}px`;
  Plotly.react(place, figure.traces, figure.layout, OPTIONS);
  if (!waiting.size) document.documentElement.dataset.drawn = performance.now();
}

function redraw() {
  for (const place of places) if (!waiting.has(place)) draw(place);
}

function redrawCurves() {
  for (const place of places) {
    if (place.dataset.figure === "curve" && !waiting.has(place)) draw(place);
  }
}

// An element of a legend: the line as it is drawn, and its name.
const DASHES = { solid: "", dash: "6 3", dot: "1.5 2.5", dashdot: "6 2 1.5 2" };

function legendButton(group, number) {
  const button = document.createElement("button");
  button.type = "button";
  button.ariaPressed = "true";
  button.title = "Click to hide or show; double-click to show only this.";
  button.innerHTML =
    '<svg aria-hidden="true"><line x1="0" y1="4" x2="24" y2="4" stroke-width="2.4"/></svg>';
  button.append(group.label || "all");
  button.querySelector("line").setAttribute("stroke-dasharray", DASHES[group.dash]);
  button.addEventListener("click", () => {
    if (!state.hidden.delete(number)) state.hidden.add(number);
    showLegend();
  });
  button.addEventListener("dblclick", () => {
    const others = data.groups.map((_, g) => g).filter((g) => g !== number);
    const alone = others.every((g) => state.hidden.has(g));
    state.hidden = new Set(alone ? [] : others);
    showLegend();
  });
  return button;
}

function showLegend() {
  document.querySelectorAll("#legend button").forEach((button, number) => {
    button.ariaPressed = String(!state.hidden.has(number));
    button.querySelector("line").setAttribute("stroke", groupColour(data.groups[number]));
  });
  redrawCurves();
}

function startSwitches() {
  const legend = document.getElementById("legend");
  if (legend && data.groups.length > 1) {
    legend.append(...data.groups.map(legendButton));
    showLegend();
  }
  const modes = document.querySelectorAll("[data-mode]");
  for (const button of modes) {
    button.addEventListener("click", () => {
      state.mode = button.dataset.mode;
      for (const other of modes) other.ariaPressed = String(other === button);
      redrawCurves();
    });
  }
  for (const button of document.querySelectorAll("[data-log]")) {
    const number = Number(button.dataset.log);
    const show = () => { button.ariaPressed = String(state.log.has(number)); };
    if (data.panels[number].log) state.log.add(number);
    show();
    button.addEventListener("click", () => {
      if (!state.log.delete(number)) state.log.add(number);
      show();
      redrawCurves();
    });
  }
  for (const name of ["heat", "parallel"]) {
    const said = document.getElementById(`${name}-clipped`);
    if (said && data[name].clipped) {
      const end = short(data[name].limits[data.higher ? 0 : 1]);
      said.textContent = `all ${data.higher ? "below" : "above"} ${end} share one colour`;
    }
  }
}

// One figure at a time, so that the page answers in between.
function drawRest() {
  const next = places.find((place) => waiting.has(place));
  if (!next) return;
  draw(next);
  requestIdleCallback(drawRest);
}

function loadPlotly() {
  const inert = document.getElementById("plotly");
  const script = document.createElement("script");
  script.textContent = inert.textContent;
  inert.remove();
  document.head.append(script);
}

function startFigures() {
  if (places.length) loadPlotly();
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && waiting.has(target)) draw(target);
    }
  }, { rootMargin: "200px" });
  for (const place of places) {
    if (place.getBoundingClientRect().top < innerHeight) draw(place);
    near.observe(place);
  }
  if (!places.length) document.documentElement.dataset.drawn = performance.now();
  dark.addEventListener("change", () => { showLegend(); redraw(); });
  document.documentElement.dataset.ready = performance.now();
  requestAnimationFrame(() => requestIdleCallback(drawRest));
}

startTables();
startSwitches();
// After the first paint: the tables can be read and sorted meanwhile.
requestAnimationFrame(() => setTimeout(startFigures));
