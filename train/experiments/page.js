"use strict";

// Tables: a click on a head sorts by its column; a further click turns the order around.
// What was not measured stays at the end.
function sortBy(head) {
  const row = head.parentNode, body = head.closest("table").tBodies[0];
  const column = [...row.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of row.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (line) => line.children[column].dataset.value;
  const order = (a, b) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const difference = head.classList.contains("number") ? a - b : a.localeCompare(b);
    return down ? -difference : difference;
  };
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
}

for (const head of document.querySelectorAll("thead th")) {
  head.firstChild.addEventListener("click", () => sortBy(head));
}

// Charts: an entry of a legend points out its group of runs; a click keeps it so.
for (const chart of document.querySelectorAll("figure.chart")) {
  const entries = [...chart.querySelectorAll(".legend button")];
  const pressed = () => entries.find((entry) => entry.ariaPressed === "true");
  const show = (entry) => {
    for (const part of chart.querySelectorAll("[data-series]")) {
      part.classList.toggle("dimmed", !!entry && part.dataset.series !== entry.value);
    }
  };
  for (const entry of entries) {
    entry.addEventListener("mouseenter", () => show(entry));
    entry.addEventListener("mouseleave", () => show(pressed()));
    entry.addEventListener("click", () => {
      const now = entry.ariaPressed !== "true";
      for (const other of entries) other.ariaPressed = "false";
      entry.ariaPressed = String(now);
      show(pressed());
    });
  }
}
