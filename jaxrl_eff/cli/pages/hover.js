// Values under the pointer, in the caption of the chart.
for (const svg of document.querySelectorAll("svg.chart")) {
  const series = JSON.parse(svg.dataset.series), left = +svg.dataset.left, right = 310;
  const out = svg.parentNode.querySelector("output"), rest = out.textContent;
  const all = series.flatMap(s => s[1].map(p => p[0]));
  const low = Math.min(...all), high = Math.max(...all);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor"); svg.append(cursor);
  svg.addEventListener("pointermove", e => {
    const x = (e.clientX - svg.getBoundingClientRect().left) * 320 / svg.clientWidth;
    const want = low + (x - left) / (right - left) * (high - low);
    const near = p => p.reduce((a, b) => Math.abs(b[0] - want) < Math.abs(a[0] - want) ? b : a);
    const at = series.filter(s => s[1].length).map(s => [s[0], near(s[1])]);
    const px = left + (at[0][1][0] - low) / ((high - low) || 1) * (right - left);
    cursor.setAttribute("d", `M${px} 8V158`);
    const few = at.slice(0, 3).map(([name, p]) => (name && at.length > 1 ? name + " " : "") + p[1]);
    out.textContent = few.join("  ") + "  at " + at[0][1][0];
  });
  svg.addEventListener("pointerleave", () => {
    out.textContent = rest; cursor.removeAttribute("d");
  });
}
