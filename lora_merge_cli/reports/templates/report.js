(() => {
  "use strict";

  const text = new Intl.Collator(undefined, { numeric: true });

  /** What a cell sorts by; null where it has no figure. */
  const key = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.dataset.value ?? cell.textContent.trim();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const numeric = header.classList.contains("number");
      header.querySelector("button").addEventListener("click", () => {
        // The largest figures first: those are the ones that people look for.
        const [first, second] = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
        const order = header.getAttribute("aria-sort") === first ? second : first;
        const sign = order === "ascending" ? 1 : -1;
        headers.forEach((other) => other.setAttribute("aria-sort", other === header ? order : "none"));
        const rows = [...table.tBodies[0].rows].map((row) => [key(row, column, numeric), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * (numeric ? a - b : text.compare(a, b));
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  const data = document.getElementById("charts");
  if (!data || !window.Plotly) return;
  const charts = JSON.parse(data.textContent);
  const dark = window.matchMedia("screen and (prefers-color-scheme: dark)");

  const paint = () => {
    const style = getComputedStyle(document.documentElement);
    const ink = (name) => style.getPropertyValue(name).trim();
    const inked = (_, value) => (typeof value === "string" && value.startsWith("--") ? ink(value) : value);
    for (const chart of charts) {
      const theme = JSON.stringify(chart.themes[dark.matches ? "dark" : "light"]);
      const [traces, layout] = JSON.parse(theme, inked);
      window.Plotly.update(document.getElementById(chart.name), traces, {
        "font.color": ink("--muted"),
        "yaxis.gridcolor": ink("--line"),
        "hoverlabel.bgcolor": ink("--card"),
        "hoverlabel.bordercolor": ink("--edge"),
        "hoverlabel.font.color": ink("--text"),
        ...layout,
      });
    }
  };

  const config = { responsive: true, displayModeBar: false, displaylogo: false, showTips: false };
  Promise.all(charts.map((chart) => window.Plotly.newPlot(chart.name, chart.data, chart.layout, config))).then(paint);
  dark.addEventListener("change", paint);
})();
