"use strict";
// Sorts the table.
(() => {
  const table = document.getElementById("rows");

  function sortBy(header) {
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    const column = header.cellIndex;
    const order = new Intl.Collator(undefined, { numeric: true });
    const value = ({ cells: { [column]: cell } }) => cell.dataset.v ?? cell.textContent;
    // Rows without a value come last either way.
    const compare = (one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === "");
      const difference = isNaN(a) || isNaN(b) ? order.compare(a, b) : a - b;
      return ascending ? difference : -difference;
    };
    table.querySelectorAll("th[aria-sort]").forEach((sorted) => sorted.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }
  for (const button of table.querySelectorAll("th button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
})();
