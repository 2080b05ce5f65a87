"use strict";
// Sorting by head and filtering by words or comparisons.

function cellKey(row, column, numeric) {
  const cell = row.cells[column];
  if (!numeric) return cell.textContent.trim();
  const value = cell.dataset.value ?? "";
  return value === "" ? NaN : Number(value);
}

function compare(a, b, numeric) {
  return numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
}

function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const descending = head.getAttribute("aria-sort") === "ascending";
  const body = table.tBodies[0];
  const numeric = head.classList.contains("number");
  const rows = [...body.rows].map((row) => [cellKey(row, column, numeric), row]);
  const empty = (key) => (numeric ? Number.isNaN(key) : key === "");
  rows.sort(([a], [b]) => {
    // What has no value stays last either way.
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    return (descending ? -1 : 1) * compare(a, b, numeric);
  });
  body.append(...rows.map(([, row]) => row));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

const TESTS = {
  "=": (order) => order === 0,
  "!=": (order) => order !== 0,
  "<": (order) => order < 0,
  ">": (order) => order > 0,
  "<=": (order) => order <= 0,
  ">=": (order) => order >= 0,
};

// A term is a word of the row's text, or COLUMN and a comparison.
function termTest(term, heads) {
  const parts = /^([^<>=!]+)(!=|<=|>=|=|<|>)(.+)$/.exec(term);
  const column = parts ? heads.indexOf(parts[1]) : -1;
  if (column < 0) return (row) => row.textContent.toLowerCase().includes(term);
  const [, , operator, wanted] = parts;
  return (row) => {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    const numeric = value !== undefined && !Number.isNaN(Number(wanted));
    if (numeric && value === "") return false;
    const order = numeric
      ? Number(value) - Number(wanted)
      : compare(cell.textContent.trim().toLowerCase(), wanted, false);
    return TESTS[operator](order);
  };
}

function filterRows(table, wanted) {
  const heads = [...table.tHead.rows[0].cells].map(
    (head) => head.querySelector("button")?.textContent.toLowerCase(),
  );
  const terms = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const tests = terms.map((term) => termTest(term, heads));
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    row.hidden = !tests.every((test) => test(row));
    shown += !row.hidden;
  }
  return shown;
}

function startTables() {
  for (const head of document.querySelectorAll("thead th")) {
    head.querySelector("button")?.addEventListener("click", () => sortBy(head));
  }
  const filter = document.getElementById("filter");
  if (!filter) return;
  const table = document.querySelector("table.arms");
  const said = document.getElementById("filtered");
  const apply = () => {
    const shown = filterRows(table, filter.value);
    said.textContent = `${shown} of ${table.tBodies[0].rows.length} runs`;
  };
  filter.addEventListener("input", apply);
  apply();
}
