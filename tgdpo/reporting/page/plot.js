// Charts as SVG, drawn at the width that they have on the screen, so that their text keeps its size.

const HEIGHT = 180;
const TEXT = 12;
const CHARACTER = 7.7;
let chartWidth = 640;

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function linear(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

// The round number, 1, 2 or 5 times a power of ten, that is next above.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * ([1, 2, 5].find((factor) => factor * power >= value * (1 - 1e-9)) ?? 10);
}

// Round values that divide a range into about `count` parts, with their texts.
function axis(low, high, { count = 5, least = 0, unit = "", title }) {
  const step = Math.max(roundUp((high - low) / count || 1), least);
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) values.push(Number((k * step).toPrecision(10)));
  const texts = together(values);
  return { low, high, title, labels: values.map((value, k) => [value, texts[k] + unit]) };
}

// Left out: labels that would cover the one before, or leave the picture.
function fitting(labels) {
  let end = 0;
  return labels.filter(([place, text]) => {
    const half = (CHARACTER * text.length) / 2;
    if (place - half < end || place + half > chartWidth) return false;
    end = place + half + 6;
    return true;
  });
}

// A figure: its marks are made by marks(x, y), which are given maps from values to pixels.
function plot(title, guide, { x, y, marks, key, header, rows, note = "" }) {
  const left = 10 + CHARACTER * Math.max(...y.labels.map(([, text]) => text.length));
  const [right, line, top] = [chartWidth - 10, HEIGHT - TEXT - 10, TEXT / 2];
  const [toX, toY] = [linear(x.low, x.high, left, right), linear(y.low, y.high, line, top)];
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${chartWidth} ${HEIGHT}`, width: chartWidth, height: HEIGHT, role: "img", "aria-label": `${title}, ${guide.name}` },
    ...y.labels.flatMap(([value, text]) => [
      svg("line", { class: "grid", x1: left, x2: right, y1: toY(value), y2: toY(value) }),
      svg("text", { class: "tick", x: left - 6, y: toY(value) + 4, "text-anchor": "end" }, text),
    ]),
    ...marks(toX, toY),
    svg("line", { class: "axis", x1: left, x2: right, y1: line, y2: line }),
    ...fitting(x.labels.map(([value, text]) => [toX(value), text])).map(([place, text]) =>
      svg("text", { class: "tick", x: place, y: HEIGHT - 6, "text-anchor": "middle" }, text),
    ),
  );
  return figure(title, guide, key, [
    element("p", { class: "axis-title" }, y.title),
    drawing,
    element("p", { class: "axis-title below" }, x.title),
    ...(note ? [element("p", { class: "note" }, note)] : []),
    element("details", {}, element("summary", {}, "Numbers"), element("div", { class: "scroll" }, tableOf(header, rows))),
  ]);
}

function figure(title, guide, key, content) {
  const of = guides.length > 1 ? element("span", { class: "of" }, guide.name) : "";
  const samples = key.flatMap(([name, text]) => [element("i", { class: name }), `${text} `]);
  return element("figure", {}, element("figcaption", {}, element("span", {}, title, " ", of), element("span", { class: "key" }, ...samples)), ...content);
}

function tableOf(header, rows) {
  const row = (cell, texts) => element("tr", {}, ...texts.map((text) => element(cell, {}, text)));
  return element("table", {}, row("th", header), ...rows.map((texts) => row("td", texts)));
}
