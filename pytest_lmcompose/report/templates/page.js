"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const canvases = [...document.querySelectorAll("[data-plot]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let drawing = Promise.resolve();

  // Figures use the page's colours; they are redrawn when the colour scheme changes.
  function themeConfig() {
    const style = getComputedStyle(document.documentElement);
    const [fg, muted, line] = ["--fg", "--muted", "--line"].map((name) => style.getPropertyValue(name).trim());
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: fg, titleColor: muted, labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12 };
    const light = ["#0b5cad", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#475569"];
    const bright = ["#7cb8f7", "#fb923c", "#5fd08a", "#c79bff", "#e5b93b", "#4cc9e0", "#f687b3", "#b4bfcc"];
    return {
      background: "transparent",
      font,
      axis: { ...text, domainColor: muted, tickColor: muted, gridColor: line },
      legend: { ...text, symbolStrokeColor: fg },
      range: { category: dark.matches ? bright : light },
      view: { stroke: null },
    };
  }

  async function draw() {
    document.documentElement.dataset.drawn = "no";
    const config = themeConfig();
    for (const [i, canvas] of canvases.entries()) {
      try {
        // The Content-Security-Policy forbids eval, so expressions are interpreted.
        await vegaEmbed(canvas, specs[i], {
          actions: false,
          ast: true,
          config,
          defaultStyle: false,
          renderer: "svg",
          tooltip: { theme: dark.matches ? "dark" : "light" },
        });
      } catch (error) {
        canvas.textContent = "This figure could not be drawn; its numbers are in the table below.";
        console.error(error);
      }
    }
    document.documentElement.dataset.drawn = "yes";
  }

  function redraw() {
    drawing = drawing.then(draw);
  }

  function key(row, column) {
    const cell = row.cells[column];
    const text = cell.dataset.order ?? cell.textContent.trim();
    const value = Number.parseFloat(text);
    return { missing: text === "-", value: /^[-+]?(\d|\.\d)/.test(text) ? value : NaN, text };
  }

  // Missing values come last in both directions.
  function sort(heading) {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => ({ row, ...key(row, column) }));
    rows.sort((a, b) => {
      if (a.missing || b.missing) return Number(a.missing) - Number(b.missing);
      const numbers = !Number.isNaN(a.value) && !Number.isNaN(b.value);
      const order = numbers ? a.value - b.value : a.text.localeCompare(b.text);
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
  }

  function filter(text) {
    const rows = [...document.querySelectorAll("#table-compositions ~ tbody > tr")];
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(text.trim().toLowerCase());
      shown += row.hidden ? 0 : 1;
    }
    document.getElementById("filter-status").textContent = text.trim() ? `${shown} of ${rows.length} shown` : "";
  }

  function open() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) target.open = true;
  }

  for (const button of document.querySelectorAll("th[aria-sort] button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }
  document.getElementById("filter")?.addEventListener("input", (event) => filter(event.target.value));
  addEventListener("hashchange", open);
  dark.addEventListener("change", redraw);
  open();
  redraw();
})();
