// What is charted: each function makes a figure a guide, all with the same axes. Data is in units of x; a map from x to
// what is shown scales it to rewards or weights.

const OF_RESPONSES = RESPONSES.map((name) => [name, name]);

function extent(values) {
  return [values.reduce((a, b) => Math.min(a, b), 0), values.reduce((a, b) => Math.max(a, b), 0)];
}

// Pairs by margin. No bin has both signs; a tie is a bar of its own kind.
function marginHistograms() {
  const margins = guides.map((_, g) => pairs.map((pair) => settings.guideBeta * pair.margins[g]));
  const [low, high] = extent(margins.flat());
  const step = roundUp((high - low) / 30 || 1);
  const from = Math.floor(low / step);
  const size = Math.max(Math.ceil(high / step), from + 1) - from;
  const bins = margins.map((values) => {
    const found = Array.from({ length: size }, (_, k) => ({ low: (from + k) * step, high: (from + k + 1) * step, count: 0, ties: 0 }));
    for (const value of values) {
      const bin = found[Math.min(Math.max(Math.floor(value / step) - from, 0), size - 1)];
      bin.count += 1;
      bin.ties += value === 0;
    }
    return found;
  });
  const x = axis(from * step, (from + size) * step, { count: 8, title: "margin: summed rewards of chosen less those of rejected" });
  const y = axis(0, Math.max(...bins.flat().map((bin) => bin.count)), { count: 4, least: 1, title: "pairs" });
  const edges = together(bins[0].flatMap((bin) => [bin.low, bin.high]));
  const ties = guides.some((guide) => guide.ties) ? [["tie", "tie"]] : [];
  return guides.map((guide, g) => {
    const label = (k) => `${edges[2 * k]} to ${edges[2 * k + 1]}`;
    const marks = (toX, toY) => [
      ...bins[g].flatMap((bin, k) => {
        const place = { x: toX(bin.low) + 0.5, width: Math.max(toX(bin.high) - toX(bin.low) - 1, 0.5) };
        const bar = (name, count, under) =>
          svg("rect", { ...place, class: name, y: toY(under + count), height: toY(0) - toY(count) }, svg("title", {}, `${label(k)}: ${bin.count} pairs`));
        return [bar("tie", bin.ties, 0), bar(bin.low < 0 ? "minus" : "plus", bin.count - bin.ties, bin.ties)];
      }),
      svg("line", { class: "zero", x1: toX(0), x2: toX(0), y1: toY(y.high), y2: toY(0) }),
    ];
    const rows = bins[g].map((bin, k) => [label(k), String(bin.count)]);
    return plot("Margins", guide, { x, y, marks, key: [["plus", "with the label"], ["minus", "against it"], ...ties], header: ["margin", "pairs"], rows });
  });
}

// Pairs by difference in length and margin: a guide that likes what is longer shows as a slope.
function marginsByLength() {
  const { guideBeta: beta } = settings;
  const [low, high] = extent(pairs.map((pair) => pair.longer));
  const [bottom, top] = extent(pairs.flatMap((pair) => pair.margins.map((margin) => beta * margin)));
  const x = axis(low, high, { count: 8, least: 1, title: "tokens of chosen less those of rejected" });
  const y = axis(bottom, top, { title: "margin" });
  return guides.map((guide, g) => {
    const texts = together(pairs.map((pair) => beta * pair.margins[g]), 3, signed);
    const marks = (toX, toY) => [
      svg("line", { class: "zero", x1: toX(0), x2: toX(0), y1: toY(top), y2: toY(bottom) }),
      svg("line", { class: "zero", x1: toX(low), x2: toX(high), y1: toY(0), y2: toY(0) }),
      ...pairs.map((pair, k) =>
        svg(
          "circle",
          { class: sideOf(pair.margins[g]), cx: toX(pair.longer), cy: toY(beta * pair.margins[g]), r: 3.5 },
          svg("title", {}, `${pair.source}: margin ${texts[k]}, ${pair.longer} tokens longer`),
        ),
      ),
    ];
    const rows = pairs.map((pair, k) => [pair.source, String(pair.longer), texts[k]]);
    const header = ["pair", "tokens longer", "margin"];
    const key = [["plus", "with the label"], ["minus", "against it"]];
    return plot("Margin against length", guide, { x, y, marks, key, header, rows, note: correlationOf(guide) });
  });
}

function sideOf(margin) {
  return margin > 0 ? "plus" : margin < 0 ? "minus" : "tie";
}

function correlationOf(guide) {
  if (!guide.by_length) return "no correlation: margin or difference in length is the same in all pairs";
  const [value, low, high] = together(guide.by_length.filter((end) => end !== null), 2, signed);
  return `correlation ${value}` + (low === undefined ? "" : `, 95 % interval ${low} to ${high}`);
}

// Tokens by value; shown[k] maps x of chosen (0) or rejected (1) tokens to what is shown, and may reverse it.
function histograms(title, unit, shown) {
  const all = guides.map((guide) =>
    guide.counts.map((counts, response) => {
      const total = counts.reduce((sum, count) => sum + count, 0);
      const bins = counts.map((count, k) => {
        const [low, high] = [shown[response](guide.edges[k]), shown[response](guide.edges[k + 1])].sort((a, b) => a - b);
        return { low, high, count, share: count / total };
      });
      return bins.sort((a, b) => a.low - b.low);
    }),
  );
  const [first] = all[0];
  const top = Math.max(...all.flat(2).map((bin) => bin.share));
  const x = axis(first[0].low, first.at(-1).high, { count: 8, title: unit });
  const y = axis(0, 100 * top, { count: 4, unit: " %", title: "share of the tokens" });
  const edges = together([...first.map((bin) => bin.low), x.high]);
  const label = (k) => `${edges[k]} to ${edges[k + 1]}`;
  return guides.map((guide, g) => {
    const [chosen, rejected] = all[g];
    const marks = (toX, toY) => [
      ...chosen.map((bin, k) =>
        svg(
          "rect",
          { class: "chosen", x: toX(bin.low) + 0.5, width: Math.max(toX(bin.high) - toX(bin.low) - 1, 0.5), y: toY(100 * bin.share), height: toY(0) - toY(100 * bin.share) },
          svg("title", {}, `${label(k)}: chosen ${percent(bin.share)}, rejected ${percent(rejected[k].share)}`),
        ),
      ),
      ...(x.low < 0 && x.high > 0 ? [svg("line", { class: "zero", x1: toX(0), x2: toX(0), y1: toY(y.high), y2: toY(0) })] : []),
      svg("path", { class: "rejected", d: rejected.map((bin, k) => `${k ? "L" : "M"}${toX(bin.low)} ${toY(100 * bin.share)}H${toX(bin.high)}`).join("") }),
    ];
    const rows = chosen.map((bin, k) => [label(k), String(bin.count), String(rejected[k].count)]);
    return plot(title, guide, { x, y, marks, key: OF_RESPONSES, header: [unit, ...RESPONSES], rows });
  });
}

// Quantiles by token position, a box a response: middle half, median, and a line from the first to the last quantile.
function positions(title, unit, shown) {
  const all = guides.map((guide) =>
    guide.positions.map((bins, response) =>
      bins.map((bin) => ({ ...bin, values: bin.quantiles.map(shown[response]).sort((a, b) => a - b) })),
    ),
  );
  const values = all.flat(2).flatMap((bin) => bin.values);
  const y = axis(Math.min(...values), Math.max(...values), { title: unit });
  const [longest] = [...all[0]].sort((a, b) => b.length - a.length);
  const x = { low: 0, high: longest.length, title: "tokens of the response from this one up to the next number", labels: longest.map((bin, k) => [k + 0.5, String(bin.first)]) };
  const name = (bin) => (bin.first === bin.last ? `${bin.first}` : `${bin.first}\u2013${bin.last}`);
  const shares = percents(report.quantiles, 0);
  const decimals = Math.max(...all.flat(2).map((bin) => decimalsOf(bin.values)));
  return guides.map((guide, g) => {
    const marks = (toX, toY) =>
      all[g].flatMap((series, r) =>
        series.map((bin, k) => {
          const middle = toX(k + (r ? 0.68 : 0.32));
          const width = 0.26 * (toX(1) - toX(0));
          const [least, lower, median, upper, most] = bin.values.map(toY);
          const spread = shares.map((share, q) => `${share} ${plain(bin.values[q], decimals)}`).join(", ");
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
    const rows = all[g].flatMap((series, r) =>
      series.map((bin) => [RESPONSES[r], name(bin), String(bin.count), ...bin.values.map((value) => plain(value, decimals))]),
    );
    return plot(title, guide, { x, y, marks, key: OF_RESPONSES, header: ["response", "tokens", "count", ...shares], rows });
  });
}

function extremeTokens() {
  return guides.map((guide) => {
    const { least_count: often, most, least } = guide.tokens;
    const decimals = decimalsOf([...most, ...least].map((token) => settings.guideBeta * token.mean), 3);
    const list = (title, tokens) => {
      const rows = tokens.map(({ text, count, mean }) => [element("code", {}, JSON.stringify(text)), signed(settings.guideBeta * mean, decimals), String(count)]);
      return element("div", {}, element("h3", {}, title), element("div", { class: "scroll" }, tableOf(["token", "mean reward", "times"], rows)));
    };
    const note = often > 1 ? `Of the tokens that occur at least ${often} times.` : "Few tokens occur more than once.";
    return figure("Tokens by mean reward", guide, [], [element("div", { class: "extremes" }, list("Most rewarded", most), list("Least rewarded", least)), element("p", { class: "note" }, note)]);
  });
}

function drawCharts(target) {
  const { alpha, guideBeta: beta } = settings;
  const reward = (x) => beta * x;
  const rewards = [reward, reward];
  const weights = [1, -1].map((sign) => (x) => 1 + sign * alpha * beta * x);
  // An empty figure has the width that those to come will have.
  const probe = element("figure", {}, element("p", { class: "note" }));
  target.replaceChildren(probe);
  chartWidth = Math.max(probe.firstChild.clientWidth, 240);
  const drawn = [marginHistograms(), marginsByLength(), histograms("Token rewards", "reward", rewards), positions("Rewards by position", "reward", rewards)];
  // With alpha 0 every weight is 1; selected tokens have 1 and the others 0.
  if (alpha > 0 && !guides.some((guide) => guide.weights)) drawn.push(histograms("Token weights", "weight", weights), positions("Weights by position", "weight", weights));
  drawn.push(extremeTokens());
  target.replaceChildren(...drawn.flat());
}
