"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const drawn = [];

  function theme(layout) {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: value("--line"), linecolor: value("--line"), zerolinecolor: value("--zero"), zerolinewidth: 2 };
    const font = { family: "system-ui, sans-serif", size: 12, color: value("--ink") };
    return {
      ...layout,
      font,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 48, r: 12, t: 8, b: 40 },
      dragmode: coarse ? false : "zoom",
      hovermode: "x",
      hoverlabel: { namelength: 40 },
      legend: { orientation: "h", y: -0.25, font },
      xaxis: { ...layout.xaxis, ...axis, zeroline: false, fixedrange: coarse },
      yaxis: { ...layout.yaxis, ...axis, fixedrange: coarse },
      shapes: below(layout.yaxis.range, value("--below")),
    };
  }

  // The part of a plot with negative heights is shaded.
  function below(range, colour) {
    if (!range || range[0] >= 0) return [];
    const top = Math.min(0, range[1]);
    return [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: range[0], y1: top, fillcolor: colour, line: { width: 0 },
      layer: "below" }];
  }

  function draw(figure) {
    figure.panels.forEach((panel, p) => {
      const div = document.getElementById(`plot-${figure.key}-${p}`);
      Plotly.newPlot(div, panel.data, theme(panel.layout), { responsive: true, displayModeBar: false });
      drawn.push({ div, layout: panel.layout });
    });
    if (figure.choices.length) control(figure);
  }

  function control(figure) {
    const slider = document.getElementById(`epoch-${figure.key}`);
    const output = document.getElementById(`shown-${figure.key}`);
    const select = document.getElementById(`choice-${figure.key}`);
    const show = () => {
      const choice = figure.choices[select ? select.selectedIndex : 0];
      const frame = choice.frames[Number(slider.value)];
      output.textContent = frame.label;
      slider.setAttribute("aria-valuetext", frame.label);
      figure.panels.forEach((panel, p) => {
        const div = document.getElementById(`plot-${figure.key}-${p}`);
        panel.layout.yaxis.range = choice.range;
        if (frame.y[p].length) Plotly.update(div, { y: frame.y[p] }, theme(panel.layout));
      });
    };
    slider.addEventListener("input", show);
    if (select) select.addEventListener("change", show);
    show();
  }

  function pick(box) {
    const run = Number(box.dataset.run);
    for (const { div } of drawn) {
      const lines = div.data.flatMap((trace, i) => (trace.meta && trace.meta.run === run ? [i] : []));
      if (lines.length) Plotly.restyle(div, { visible: box.checked }, lines);
    }
  }

  figures.forEach(draw);
  document.querySelectorAll("input[data-run]").forEach((box) => {
    box.addEventListener("change", () => pick(box));
    if (!box.checked) pick(box);
  });
  dark.addEventListener("change", () => drawn.forEach(({ div, layout }) => Plotly.relayout(div, theme(layout))));
})();
