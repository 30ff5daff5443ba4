// Charts as SVG. Their data is in units of x; a map from x to what is shown scales it to rewards or weights.

const WIDTH = 680;
const HEIGHT = 180;
const MARGIN = { left: 46, right: 10, top: 8, bottom: 34 };

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function linear(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

// Round values that divide a range into about `count` parts.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(10)));
  return found;
}

function number(value) {
  return String(Number(value.toPrecision(3))).replace("-", "\u2212");
}

function axisLeft(y, values, format) {
  return values.flatMap((value) => [
    svg("line", { class: "grid", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(value), y2: y(value) }),
    svg("text", { class: "tick", x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)),
  ]);
}

function axisBottom(places, title) {
  const line = HEIGHT - MARGIN.bottom;
  return [
    svg("line", { class: "axis", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: line, y2: line }),
    ...places.map(([x, label]) => svg("text", { class: "tick", x, y: line + 14, "text-anchor": "middle" }, label)),
    svg("text", { class: "tick", x: (MARGIN.left + WIDTH - MARGIN.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, title),
  ];
}

function figure(title, drawing, header, rows) {
  const key = element("span", { class: "key" }, element("i", { class: "chosen" }), "chosen ", element("i", { class: "rejected" }), "rejected");
  const table = element(
    "table",
    {},
    element("tr", {}, ...header.map((text) => element("th", {}, text))),
    ...rows.map((row) => element("tr", {}, ...row.map((text) => element("td", {}, text)))),
  );
  const numbers = element("details", {}, element("summary", {}, "Numbers"), element("div", { class: "scroll" }, table));
  return element("figure", {}, element("figcaption", {}, title, key), drawing, numbers);
}

// Tokens by value; shown[k] maps x of chosen (0) or rejected (1) tokens to what is shown, and may reverse it.
function histogram(title, axis, shown) {
  const series = metrics.counts.map((counts, response) => {
    const total = counts.reduce((sum, count) => sum + count, 0);
    const bins = counts.map((count, k) => {
      const [low, high] = [shown[response](metrics.edges[k]), shown[response](metrics.edges[k + 1])].sort((a, b) => a - b);
      return { low, high, count, share: count / total };
    });
    return bins.sort((a, b) => a.low - b.low);
  });
  const [chosen, rejected] = series;
  const [low, high] = [chosen[0].low, chosen.at(-1).high];
  const top = Math.max(...series.flat().map((bin) => bin.share));
  const x = linear(low, high, MARGIN.left, WIDTH - MARGIN.right);
  const y = linear(0, top, HEIGHT - MARGIN.bottom, MARGIN.top);
  const label = (bin) => `${number(bin.low)} to ${number(bin.high)}`;
  const bars = chosen.map((bin, k) =>
    svg(
      "rect",
      { class: "chosen", x: x(bin.low) + 0.5, width: Math.max(x(bin.high) - x(bin.low) - 1, 0.5), y: y(bin.share), height: y(0) - y(bin.share) },
      svg("title", {}, `${label(bin)}: chosen ${percent(bin.share)}, rejected ${percent(rejected[k].share)}`),
    ),
  );
  const outline = rejected.map((bin, k) => `${k ? "L" : "M"}${x(bin.low)} ${y(bin.share)}H${x(bin.high)}`).join("");
  const zero = low < 0 && high > 0 ? [svg("line", { class: "zero", x1: x(0), x2: x(0), y1: MARGIN.top, y2: y(0) })] : [];
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title },
    ...axisLeft(y, ticks(0, top, 4), (share) => percent(share, 0)),
    ...bars,
    ...zero,
    svg("path", { class: "rejected", d: outline }),
    ...axisBottom(ticks(low, high, 8).map((value) => [x(value), number(value)]), axis),
  );
  const rows = chosen.map((bin, k) => [label(bin), String(bin.count), String(rejected[k].count)]);
  return figure(title, drawing, [axis, "chosen", "rejected"], rows);
}

// Quantiles by token position, a box a response: middle half, median, and a line from the first to the last quantile.
function positions(title, axis, shown) {
  const responses = metrics.positions.map((bins, response) =>
    bins.map((bin) => ({ ...bin, values: bin.quantiles.map(shown[response]).sort((a, b) => a - b) })),
  );
  const all = responses.flat().flatMap((bin) => bin.values);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const y = linear(low, high, HEIGHT - MARGIN.bottom - 4, MARGIN.top);
  const bins = Math.max(...responses.map((series) => series.length));
  const slot = (WIDTH - MARGIN.left - MARGIN.right) / bins;
  const name = (bin) => (bin.first === bin.last ? `${bin.first}` : `${bin.first}\u2013${bin.last}`);
  const boxes = responses.flatMap((series, r) =>
    series.map((bin, k) => {
      const middle = MARGIN.left + slot * (k + (r ? 0.68 : 0.32));
      const width = slot * 0.26;
      const [least, lower, median, upper, most] = bin.values.map(y);
      const spread = metrics.quantiles.map((share, q) => `${percent(share, 0)} ${number(bin.values[q])}`).join(", ");
      return svg(
        "g",
        { class: RESPONSES[r] },
        svg("title", {}, `${RESPONSES[r]} tokens ${name(bin)} (${bin.count}): ${spread}`),
        svg("line", { class: "whisker", x1: middle, x2: middle, y1: least, y2: most }),
        svg("rect", { x: middle - width / 2, width, y: upper, height: Math.max(lower - upper, 1) }),
        svg("line", { class: "median", x1: middle - width / 2, x2: middle + width / 2, y1: median, y2: median }),
      );
    }),
  );
  const longest = responses[0].length >= responses[1].length ? responses[0] : responses[1];
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title },
    ...axisLeft(y, ticks(low, high, 5), number),
    ...boxes,
    ...axisBottom(longest.map((bin, k) => [MARGIN.left + slot * (k + 0.5), String(bin.first)]), axis),
  );
  const header = ["response", "tokens", "count", ...metrics.quantiles.map((share) => percent(share, 0))];
  const rows = responses.flatMap((series, r) =>
    series.map((bin) => [RESPONSES[r], name(bin), String(bin.count), ...bin.values.map((value) => number(value))]),
  );
  return figure(title, drawing, header, rows);
}

function drawCharts(target) {
  const { alpha, beta } = settings;
  const reward = (x) => beta * x;
  const rewards = [reward, reward];
  const place = "place in the response, from this token up to the next number";
  const weights = [1, -1].map((sign) => (x) => 1 + sign * alpha * beta * x);
  const drawn = [histogram("Token rewards", "reward", rewards), positions("Rewards by position", place, rewards)];
  // With alpha 0 every weight is 1.
  if (alpha > 0)
    drawn.push(histogram("Token weights", "weight", weights), positions("Weights by position", place, weights));
  target.replaceChildren(...drawn);
}
