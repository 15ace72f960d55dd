"use strict";
(() => {
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

  async function unpack() {
    const packed = document.getElementById("packed");
    if (!packed) return;
    const bytes = Uint8Array.from(atob(packed.dataset.gzip), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    packed.outerHTML = await new Response(stream).text();
    document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  }

  function start() {
    for (const button of document.querySelectorAll("th[aria-sort] button")) {
      button.addEventListener("click", () => sort(button.closest("th")));
    }
    document.getElementById("filter")?.addEventListener("input", (event) => filter(event.target.value));
    addEventListener("hashchange", open);
    open();
    document.documentElement.dataset.ready = "yes";
  }

  unpack().then(start);
})();
