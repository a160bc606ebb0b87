"use strict";
// Draws the figures when they come into view, in the page's colours; sorts the table.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function colors() {
    return dark.matches
      ? { text: "#e3e7eb", grid: "#2c343c", back: "#14181d" }
      : { text: "#1b1f24", grid: "#e4e8ec", back: "#ffffff" };
  }

  // What the layouts leave to the page.
  function themed(layout) {
    const { text, grid, back } = colors();
    const axis = (own) => ({
      gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, exponentformat: "power", ...own,
      title: { standoff: 8, ...(own && own.title) },
    });
    return {
      margin: { l: 48, r: 12, t: 12, b: 40 }, showlegend: true, hovermode: "closest", autosize: true,
      legend: { orientation: "h", y: -0.2 },
      hoverlabel: { namelength: -1 }, paper_bgcolor: back, plot_bgcolor: back,
      font: { family: "system-ui, sans-serif", size: 12, color: text },
      ...layout, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    };
  }

  function draw(plot) {
    const { data, layout } = figures[plots.indexOf(plot)];
    const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
    plot.dataset.drawn = "true";
    return Plotly.react(plot, data, themed(layout), config);
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
  }, { rootMargin: "300px" });
  plots.forEach((plot) => seen.observe(plot));
  dark.addEventListener("change", () => plots.filter((plot) => plot.dataset.drawn).forEach(draw));

  // The table.
  const table = document.getElementById("rows");
  document.getElementById("all-columns").addEventListener("change", (event) => {
    table.classList.toggle("all", event.target.checked);
  });

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
    table.querySelectorAll("th[aria-sort]").forEach((it) => it.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }
  for (const button of table.querySelectorAll("th button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
})();
