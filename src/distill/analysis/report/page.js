// A cursor on each chart, by pointer or arrow keys; its values are those of the chart's table, shown in the legend.
"use strict";
for (const figure of document.querySelectorAll("figure")) {
  const { left, right, low, high } = Object.fromEntries(Object.entries(figure.dataset).map(([k, v]) => [k, Number(v)]));
  const plot = figure.querySelector(".plot");
  const cursor = figure.querySelector(".cursor");
  const place = figure.querySelector(".at");
  const labels = [...figure.querySelectorAll(".legend .label")].map((label) => label.textContent);
  const values = [...figure.querySelectorAll(".legend .value")];
  const resting = values.map((value) => value.textContent);
  const rows = [...figure.querySelectorAll("tbody tr")].map((row) => ({
    x: Number(row.cells[0].dataset.x),
    name: `${figure.dataset.axis} ${row.cells[0].textContent}`,
    cells: [...row.cells].slice(1).map((cell) => cell.textContent),
  }));
  let index = rows.length - 1;

  const show = (to) => {
    index = Math.min(Math.max(to, 0), rows.length - 1);
    const row = rows[index];
    const share = (row.x - low) / (high - low);
    cursor.hidden = place.hidden = false;
    cursor.style.left = place.style.left = `${100 * (left + (right - left) * share)}%`;
    place.style.translate = `${-100 * share}%`;
    place.textContent = row.name;
    values.forEach((value, i) => (value.textContent = row.cells[i] || "–"));
    plot.setAttribute("aria-valuenow", index);
    const said = row.cells.map((cell, i) => cell && `${labels[i]} ${cell}`).filter(Boolean);
    plot.setAttribute("aria-valuetext", `${row.name}: ${said.join(", ")}`);
  };
  const rest = () => {
    cursor.hidden = place.hidden = true;
    values.forEach((value, i) => (value.textContent = resting[i]));
  };

  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-valuemin", 0);
  plot.setAttribute("aria-valuemax", rows.length - 1);
  show(index);
  rest();
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = low + (((event.clientX - box.left) / box.width - left) / (right - left)) * (high - low);
    let nearest = 0;
    rows.forEach((row, i) => { if (Math.abs(row.x - x) < Math.abs(rows[nearest].x - x)) nearest = i; });
    show(nearest);
  });
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: index - 1, ArrowDown: index - 1, ArrowRight: index + 1, ArrowUp: index + 1,
      PageDown: index - 10, PageUp: index + 10, Home: 0, End: rows.length - 1 };
    if (event.key === "Escape") rest();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(cursor.hidden && event.key.startsWith("Arrow") ? index : moves[event.key]);
  });
}
