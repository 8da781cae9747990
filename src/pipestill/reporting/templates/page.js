"use strict";
const table = document.getElementById("table");
const tableBody = table.tBodies[0];
const original = Array.from(tableBody.rows);
const heads = Array.from(table.tHead.rows[1].cells);

function sortValue(row, column) {
  const cell = row.cells[column];
  if (column === 0) return row.querySelector(".run").textContent.trim();
  return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
}

function sortBy(column) {
  const head = heads[column];
  const first = column === 0 ? "ascending" : head.dataset.first || "ascending";
  const second = first === "ascending" ? "descending" : "ascending";
  const now = head.getAttribute("aria-sort");
  const next = now === null ? first : now === first ? second : null;
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  let rows = original;
  if (next !== null) {
    head.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const rank = (row) => (row.classList.contains("floor") ? 0 : sortValue(row, column) === null ? 2 : 1);
    rows = original.slice().sort((a, b) => {
      if (rank(a) !== rank(b)) return rank(a) - rank(b);
      if (rank(a) !== 1) return 0;
      const x = sortValue(a, column), y = sortValue(b, column);
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
  }
  tableBody.append(...rows);
}
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sortBy(column)));

function reveal() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let node = target.closest("details"); node; node = node.parentElement.closest("details")) node.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();
